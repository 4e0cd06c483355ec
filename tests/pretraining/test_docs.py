"""docs/pretrain.md: its MONAI code loads what diffaug pretrains, and prepares cases as diffaug does."""

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks import nets

from diffaug.pretraining.loading import tensors
from diffaug.segmentation.cases import standardise
from diffaug.segmentation.networks import NetworkPlan, build_network

PAGE = (Path(__file__).parents[2] / "docs" / "pretrain.md").read_text()


def test_monai_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pretrained").mkdir()
    pretrained = build_network(NetworkPlan(kind="dynunet"), 1, 3, seed=0)
    torch.save(pretrained.state_dict(), "pretrained/monai.pt")
    (code,) = re.findall(r"<!-- monai -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    state = names["network"].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in pretrained.state_dict().items())

    image = np.random.default_rng(0).gamma(2, 100, (20, 24, 18)).astype(np.float32)
    for name in ("image", "label"):
        nib.save(nib.Nifti1Image(image, np.eye(4)), f"{name}.nii.gz")
    case = names["prepare"]({"image": "image.nii.gz", "label": "label.nii.gz"})
    expected = standardise(torch.from_numpy(image)[None], None)
    torch.testing.assert_close(torch.as_tensor(case["image"]), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["segresnet", "unet", "swinunetr"])
def test_networks_of_the_table(kind: str) -> None:
    (code,) = re.findall(rf"\| `{kind}` \| `(.*?)` \|", PAGE)
    theirs = eval(code, vars(nets).copy())
    own = build_network(NetworkPlan.model_validate({"kind": kind}), 1, 3)
    assert {n: p.shape for n, p in tensors(theirs).items()} == {n: p.shape for n, p in tensors(own).items()}
