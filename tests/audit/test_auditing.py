"""Whole audits: what they find in a small world, what they keep, and what they refuse."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import diffaug.audit.encoder
import diffaug.audit.volumes
from diffaug.audit.auditing import Options, Part, audit
from diffaug.audit.record import Report
from diffaug.errors import DatasetError, DiffaugError
from tests.audit.conftest import STEPS, Audited
from tests.audit.world import Person, World, part, write_decathlon

SPACES = ["encoder", "intensities"]
QUESTIONS = ["copies", "nearer", "tell", "look like", "varied", "large"]


def renamed(found: Part, patients: Sequence[str]) -> Part:
    """The first cases of a part, with these patients."""
    pairs = zip(found.cases, patients, strict=False)
    return Part(found.dataset, [dataclasses.replace(case, patient=patient) for case, patient in pairs])


# -------- what is found


def test_the_report_reads_back_and_names_its_sets(leaky: Audited, world: World) -> None:
    text = (leaky.output / "report.json").read_text()
    assert Report.model_validate_json(text) == leaky.report
    report = leaky.report
    sets = report.synthetic, report.training, report.held_out
    assert [(s.cases, s.patients) for s in sets] == [(24, None), (30, 20), (20, 16)]
    assert [s.licence for s in sets] == [None, "CC0-1.0", "CC0-1.0"]
    assert len({s.files for s in sets}) == 3
    assert [space.name for space in report.spaces] == SPACES
    assert (report.grid.shape, report.grid.spacing) == ((16, 16, 16), (2.0, 2.0, 2.0))
    assert f"{STEPS} steps" in report.encoder
    assert report.notes == []
    for verdict, word in zip(report.verdicts, QUESTIONS, strict=True):
        assert word in verdict.question


def test_planted_copies_are_clear_beside_their_originals(leaky: Audited, world: World) -> None:
    clear = {suspect.synthetic: suspect for suspect in leaky.report.suspects if suspect.clear}
    assert {name: suspect.training for name, suspect in clear.items()} == world.copies | world.mirrored
    for name in world.copies:
        assert clear[name].similarity == pytest.approx(1, abs=1e-3)
        assert clear[name].search in SPACES
    assert {clear[name].search.split(", ")[-1] for name in world.mirrored} == {"mirrored"}
    assert [suspect.clear for suspect in leaky.report.suspects[:4]] == [True] * 4
    assert leaky.report.copies.clear_copies == 4
    assert leaky.report.copies.copies == len(leaky.report.suspects)
    assert leaky.report.verdicts[0].answer == leaky.report.answer == "fail"


def test_plain_searches_find_exact_copies_and_mirrored_ones_mirrored(leaky: Audited) -> None:
    found = {search.name: search for search in leaky.report.copies.searches}
    assert (found["intensities"].clear_copies, found["intensities, mirrored"].clear_copies) == (3, 1)
    # The encoder suspects them, and is not decisive.
    assert found["encoder"].copies >= 3
    assert found["encoder, mirrored"].copies >= 1
    assert found["encoder"].clear_copies == found["encoder, mirrored"].clear_copies == 0


def test_scans_of_others_hold_no_clear_copies(run_audit: Callable[[Path], Audited], world: World) -> None:
    honest = run_audit(world.honest)
    assert honest.report.copies.clear_copies == 0
    assert not any(suspect.clear for suspect in honest.report.suspects)
    answers = dict(zip(QUESTIONS, (verdict.answer for verdict in honest.report.verdicts), strict=True))
    assert "fail" not in answers.values(), answers
    assert [answers[word] for word in ("look like", "varied")] == ["pass"] * 2
    # Twenty patients: chance explains more than a fifth.
    assert answers["copies"] == "unclear"


def test_noise_does_not_look_like_scans(run_audit: Callable[[Path], Audited], world: World) -> None:
    report = run_audit(world.noise).report
    verdict = report.verdicts[QUESTIONS.index("look like")]
    assert verdict.answer == "fail"
    assert report.copies.clear_copies == 0
    assert report.measures["roughness"].synthetic.value > 4
    for axis in "ijk":
        assert report.measures[f"slice_consistency_{axis}"].synthetic.value == 1


def test_held_out_scans_in_the_place_of_samples_hold_no_clear_copies(
    world: World, cache: Path, short_audits: None, tmp_path: Path
) -> None:
    held_out = world.held_out
    by_patient = {case.patient: case for case in world.held_out.cases}
    first = set(list(by_patient)[:8])
    samples = [case for case in held_out.cases if case.patient not in first]
    others = [case for case in held_out.cases if case.patient in first]
    # Enough cases for an audit.
    samples += [dataclasses.replace(case, name=f"{case.name}_again") for case in samples][: 16 - len(samples)]
    report = audit(
        Part(held_out.dataset, samples),
        world.training,
        Part(held_out.dataset, others),
        tmp_path / "out",
        cache=cache,
        options=Options(steps=STEPS),
    )
    assert report.copies.clear_copies == 0


def test_features_and_networks_are_further_spaces(
    world: World, cache: Path, short_audits: None, tmp_path: Path
) -> None:
    features = tmp_path / "features.csv"
    training, held_out, made = world.training, world.held_out, part(world.leaky)
    random = np.random.default_rng(0)
    rows = {case.name: random.normal(size=8) for p in (training, held_out, made) for case in p.cases}
    rows["made_005"] = rows["train_02_0"]
    features.write_text(
        "case,a,b,c,d,e,f,g,h\n"
        + "".join(f"{name},{','.join(map(str, values))}\n" for name, values in rows.items())
    )
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    network = nets.resnet10(spatial_dims=3, n_input_channels=1, feed_forward=False)
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    report = audit(
        made,
        training,
        held_out,
        tmp_path / "out",
        cache=cache,
        options=Options(
            steps=STEPS, features=features, network=("resnet10", tmp_path / "resnet.safetensors")
        ),
    )
    assert [space.name for space in report.spaces] == [*SPACES, "network", "features"]
    first = next(suspect for suspect in report.suspects if suspect.search == "features")
    assert (first.synthetic, first.training, first.similarity) == ("made_005", "train_02_0", pytest.approx(1))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "resnet10 with your weights" in page
    assert "your features (features.csv)" in page


def test_what_a_set_lacks_is_noted(world: World, cache: Path, short_audits: None, tmp_path: Path) -> None:
    """Neither label maps nor a table of patients; so its names may be those of known patients."""
    people = np.random.default_rng(5)
    scans = {f"case {number}": Person(people).scan() for number in range(9)}
    bare = part(write_decathlon(tmp_path / "Bare", scans, labels={}))
    training = renamed(world.training, [f"case {number % 12}" for number in range(30)])
    options = Options(steps=STEPS, notes=["Made on a Sunday."])
    report = audit(part(world.honest), training, bare, tmp_path / "out", cache=cache, options=options)
    assert report.held_out.patients is None
    assert not any(name.startswith("volume") for name in report.measures)
    assert len(report.verdicts) == len(QUESTIONS) - 1
    for note, words in zip(
        report.notes,
        ("No patient table was given for the held-out", "Label volumes were not compared", "on a Sunday"),
        strict=True,
    ):
        assert words in note
        assert note in (tmp_path / "out" / "report.html").read_text()


# -------- what is kept


def test_a_second_audit_reads_what_the_first_kept(
    leaky: Audited,
    run_audit: Callable[[Path], Audited],
    world: World,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir() if path.name != "README.txt"}

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(diffaug.audit.encoder, "fit_embedder", refuse)
    monkeypatch.setattr(diffaug.audit.volumes, "load_case", refuse)
    again = run_audit(world.leaky)
    assert again.report == leaky.report
    assert (again.output / "report.json").read_bytes() == (leaky.output / "report.json").read_bytes()
    assert (again.output / "report.html").read_bytes() == (leaky.output / "report.html").read_bytes()
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time


def test_scans_are_kept_in_the_cache_with_a_warning_and_nowhere_else(leaky: Audited, cache: Path) -> None:
    assert "hold scans" in (cache / "README.txt").read_text()
    assert list(cache.glob("encoder-*.safetensors"))
    assert not [path for path in leaky.output.rglob("*") if path.suffix in (".npy", ".gz", ".nii")]


def test_scans_are_kept_in_private_by_default(world: World, short_audits: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    audit(part(world.honest), world.training, world.held_out, out, options=Options(steps=1))
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", "private"}
    assert len(list((out / "private").glob("*.npy"))) == 3
    assert not list(out.rglob(".tmp-*"))
    json.loads((out / "report.json").read_text())


# -------- what is refused


def refused(
    synthetic: Part, training: Part, held_out: Part, output: Path, options: Options | None = None
) -> str:
    """The message of an audit that is refused before anything is written."""
    with pytest.raises(DiffaugError) as caught:
        audit(synthetic, training, held_out, output, options=options or Options(steps=1))
    assert not output.exists()
    return str(caught.value)


def test_too_few_samples_are_refused(world: World, tmp_path: Path) -> None:
    made = part(world.honest)
    few = Part(made.dataset, made.cases[:15])
    message = refused(few, world.training, world.held_out, tmp_path / "out")
    assert "15 synthetic cases" in message
    assert "at least 16" in message


def test_too_few_patients_are_refused_however_many_scans_they_have(world: World, tmp_path: Path) -> None:
    made, training, held_out = part(world.honest), world.training, world.held_out
    few = [f"P{number % 7}" for number in range(20)]
    message = refused(made, training, renamed(held_out, few), tmp_path / "out")
    assert "20 held-out cases of 7 patients" in message
    assert "at least 8 patients" in message
    message = refused(made, renamed(training, few), held_out, tmp_path / "out")
    assert "20 training cases of 7 patients" in message


def test_samples_that_a_table_gives_to_one_patient_are_refused(world: World, tmp_path: Path) -> None:
    samples = renamed(part(world.honest), ["somebody"] * 24)
    assert "patient" in refused(samples, world.training, world.held_out, tmp_path / "out")


def test_a_patient_in_both_sets_is_refused(world: World, tmp_path: Path) -> None:
    training, held_out = world.training, world.held_out
    leaked = renamed(held_out, [training.cases[0].patient, *(case.patient for case in held_out.cases[1:])])
    with pytest.raises(DatasetError, match=r"1 patients are among .*train patient 0"):
        audit(part(world.honest), training, leaked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_does_not_serve_as_its_own_held_out_set(world: World, tmp_path: Path) -> None:
    honest = part(world.honest)
    message = refused(part(world.leaky), honest, honest, tmp_path / "out")
    assert "24 patients are among the training and the held-out cases" in message


def test_other_numbers_of_channels_are_refused(world: World, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    folder = tmp_path / "Two"
    write_decathlon(folder, {f"two_{n}": Person(random).scan() for n in range(16)})
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"modality": {"0": "T1", "1": "T2"}}))
    message = refused(part(folder), world.training, world.held_out, tmp_path / "out")
    assert "[1, 2] channels" in message


def test_an_unknown_network_is_refused(world: World, tmp_path: Path) -> None:
    options = Options(network=("vgg", tmp_path / "weights.pt"))
    message = refused(part(world.honest), world.training, world.held_out, tmp_path / "out", options)
    assert "no network 'vgg'" in message


def test_a_network_for_other_channels_is_refused(world: World, tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    weights = tmp_path / "two.safetensors"
    save_file(nets.resnet10(spatial_dims=3, n_input_channels=2, feed_forward=False).state_dict(), weights)
    options = Options(steps=1, network=("resnet10", weights))
    message = refused(part(world.honest), world.training, world.held_out, tmp_path / "out", options)
    assert "two.safetensors" in message


def test_features_that_lack_a_case_are_refused(world: World, tmp_path: Path) -> None:
    features = tmp_path / "features.csv"
    features.write_text("case,a,b,c\ntrain_00_0,1,2,3\n")
    options = Options(steps=1, features=features)
    message = refused(part(world.honest), world.training, world.held_out, tmp_path / "out", options)
    assert "features.csv has no features of" in message


def test_utility_without_shared_labels_is_refused(world: World, tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    scans = {f"other_{number:02d}": Person(random).scan() for number in range(16)}
    labels = {"background": 0, "kernel": 1, "husk": 2}
    made = part(write_decathlon(tmp_path / "Other", scans, labels=labels))
    options = Options(steps=1, utility=True)
    message = refused(made, world.training, world.held_out, tmp_path / "out", options)
    assert "kernel" in message


def test_a_damaged_scan_leaves_no_report_and_is_named(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.honest, tmp_path / "Damaged")
    scan = tmp_path / "Damaged" / "imagesTr" / "made_004_0000.nii.gz"
    content = scan.read_bytes()
    scan.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"made_004_0000\.nii\.gz"):
        audit(part(tmp_path / "Damaged"), world.training, world.held_out, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("report*"))
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_a_training_scan_among_the_held_out_ones_is_refused(world: World, tmp_path: Path) -> None:
    """It would set the threshold for copies to the largest similarity that there is."""
    training, held_out = world.training, world.held_out
    doubled = dataclasses.replace(training.cases[0], name="twin", patient="somebody else")
    with pytest.raises(DatasetError, match=rf"1 held-out scans .* \(twin is {training.cases[0].name}\)"):
        audit(
            Part.whole(world.honest),
            training,
            Part(held_out.dataset, [*held_out.cases, doubled]),
            tmp_path / "report",
            options=Options(steps=2),
        )
    assert not (tmp_path / "report" / "report.json").exists()


def test_a_device_that_is_not_there_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    with pytest.raises(DiffaugError, match="cannot use the device nowhere"):
        audit(
            part(world.leaky),
            world.training,
            world.held_out,
            tmp_path / "audit",
            options=Options(device="nowhere"),
        )
    assert not (tmp_path / "audit").exists()
