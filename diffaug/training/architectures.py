"""The architectures that can be fitted: their plans, how one is made, and their training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from accelerate import Accelerator
from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator
from diffaug.generators.joint_flow.model import JointFlow
from diffaug.generators.medical_diffusion.model import CITATION, MedicalDiffusion
from diffaug.progress import Progress
from diffaug.training.cases import Canvases
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.joint_flow.planning import make_plan as plan_joint_flow
from diffaug.training.joint_flow.training import train as train_joint_flow
from diffaug.training.medical_diffusion.plan import MedicalDiffusionPlan
from diffaug.training.medical_diffusion.planning import make_plan as plan_medical_diffusion
from diffaug.training.medical_diffusion.training import train as train_medical_diffusion
from diffaug.training.planning import Request
from diffaug.training.trained import Trained

Plan = JointFlowPlan | MedicalDiffusionPlan
ARCHITECTURES = ("joint-flow", "medical-diffusion")
# Whom users of a generator cite beside its data.
CITATIONS: dict[str, list[str]] = {"joint-flow": [], "medical-diffusion": [CITATION]}


def _architecture_of(plan: Any) -> str:
    found = plan.get("architecture", ARCHITECTURES[0]) if isinstance(plan, dict) else plan.architecture
    return str(found)


_ADAPTER: TypeAdapter[Plan] = TypeAdapter(
    Annotated[
        Annotated[JointFlowPlan, Tag("joint-flow")]
        | Annotated[MedicalDiffusionPlan, Tag("medical-diffusion")],
        Discriminator(_architecture_of),
    ]
)


def read_plan(path: Path) -> Plan:
    """Read a plan that `diffaug fit --dry-run` wrote and perhaps a user edited.

    Raises:
        DiffaugError: names the file and every field that is wrong.
    """
    try:
        return _ADAPTER.validate_json(path.read_text())
    except OSError as error:
        raise DiffaugError(f"cannot read the plan {path}: {error}") from error
    except ValidationError as error:
        lines = "\n".join(
            f"  {'.'.join(str(part) for part in e['loc'] if part not in ARCHITECTURES) or 'file'}: {e['msg']}"
            for e in error.errors()
        )
        raise DiffaugError(f"the plan {path} is not valid:\n{lines}") from error


def make_plan(architecture: str, request: Request, accelerator: Accelerator) -> Plan:
    """The plan of a fit; raises DiffaugError where none fits."""
    if architecture == "joint-flow":
        return plan_joint_flow(request, accelerator)
    if architecture == "medical-diffusion":
        return plan_medical_diffusion(request, accelerator)
    raise DiffaugError(f"there is no architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")


def train(
    plan: Plan,
    training: Canvases,
    validation: Canvases,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    start: Generator | None,
    perceptual: Sequence[Path],
) -> Trained:
    """Train all stages, or finish what an earlier call left in `folder`."""
    initial = start.model if start else None
    if isinstance(plan, JointFlowPlan):
        assert initial is None or isinstance(initial, JointFlow)
        return train_joint_flow(plan, training, validation, folder, accelerator, progress, initial)
    assert initial is None or isinstance(initial, MedicalDiffusion)
    return train_medical_diffusion(
        plan, training, validation, folder, accelerator, progress, initial, perceptual
    )
