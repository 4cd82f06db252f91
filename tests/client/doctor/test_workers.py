"""Findings for the probe facts of different machines."""

import copy

import pytest

from xditd.client.doctor import workers
from xditd.client.doctor.findings import Verdict

GPU = {"index": 0, "name": "H200", "uuid": "GPU-a", "capability": "9.0", "free_bytes": 2**37, "total_bytes": 2**37}
SOUND = {
    "packages": dict.fromkeys((*workers.NEEDED, "cuda-bindings"), "1.0"),
    "gpus": [GPU, {**GPU, "index": 1, "uuid": "GPU-b"}],
    "peers": [[0, 1], [1, 0]],
    "error": "",
    "cuda": "13.0",
    "attention": ["CUDNN", "SDPA"],
    "attention_plain": "CUDNN",
    "attention_fused": "FLASH_3_FORWARD",
    "attention_error": "",
}


def verdicts(**changes):
    found = workers.check_workers({**copy.deepcopy(SOUND), **changes})
    return {each.check: each.verdict for each in found if each.verdict is not Verdict.OK}


def test_machine_without_faults():
    assert verdicts() == {}
    details = " ".join(each.detail for each in workers.check_workers(SOUND))
    for words in ("GPU-a", "GPU-b", "128 of 128 GiB", "CUDNN", "all 2 GPUs access each other directly", "torch 1.0"):
        assert words in details


@pytest.mark.parametrize(
    ("plain", "fused", "says"),
    [
        (
            "CUDNN",
            "FLASH_3_FORWARD",
            "auto runs FLASH_3_FORWARD in fused kernels, CUDNN in other modules; also here: SDPA",
        ),
        ("CUDNN", "CUDNN", "auto runs CUDNN; also here: SDPA"),
        ("SDPA", "", "auto runs SDPA; also here: CUDNN"),
    ],
)
def test_the_attention_that_will_run_is_named(plain, fused, says):
    facts = {**SOUND, "attention_plain": plain, "attention_fused": fused}
    (finding,) = [each for each in workers.check_workers(facts) if each.check == "attention"]
    assert finding.detail == says


def test_optional_packages_are_named_where_they_are():
    packages = SOUND["packages"] | {"comfy-kitchen": "0.2"}
    named = [workers.check_workers(SOUND | {"packages": each})[0].detail for each in (packages, SOUND["packages"])]
    assert ["comfy-kitchen 0.2" in each for each in named] == [True, False]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peers": []}, {"peer access": Verdict.WARN}),
        ({"gpus": [GPU], "peers": []}, {}),
        ({"gpus": [], "peers": [], "cuda": ""}, {"GPUs": Verdict.WARN}),
        ({"error": "driver too old"}, {"driver": Verdict.FAIL}),
        ({"attention": [], "attention_error": "no kernel"}, {"attention": Verdict.FAIL}),
        ({"packages": {"torch": "1"}}, {"workers' libraries": Verdict.FAIL}),
        ({"packages": dict.fromkeys(workers.NEEDED, "1")}, {"cuda-bindings": Verdict.FAIL}),
    ],
)
def test_faults_are_named(changes, expected):
    assert verdicts(**changes) == expected


def test_the_layout_for_these_gpus_is_explained():
    (finding,) = [each for each in workers.check_workers(SOUND) if each.check == "layout for 2 workers"]
    assert finding.detail == (
        "ulysses=2: ulysses=2 divides the 24 attention heads (assumed); "
        "models whose heads ulysses=2 does not divide get degrees of their own (asked for: auto)"
    )
    assert [note.split(":")[0] for note in finding.notes] == ["not ring=2", "not cfg=2"]
    (finding,) = [each for each in workers.check_workers({**SOUND, "gpus": []}) if each.check.startswith("layout")]
    assert finding.check == "layout for 2 workers"  # as many start on a CPU
    assert not [
        each for each in workers.check_workers(SOUND, has_layout=False) if each.check.startswith("layout")
    ]  # a daemon that runs has its own


def test_every_complaint_has_a_remedy():
    for changes in ({"peers": []}, {"gpus": []}, {"error": "x"}, {"attention": []}, {"packages": {}}):
        for each in workers.check_workers({**SOUND, **changes}):
            assert bool(each.remedy) == (each.verdict is not Verdict.OK)


def test_probe_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr(workers, "module_command", lambda *_: ["python3", "-c", "raise SystemExit('no libcuda')"])
    assert workers.probe() == "status 1: no libcuda"
    monkeypatch.setattr(workers, "module_command", lambda *_: ["python3", "-c", "print('Segmentation fault')"])
    assert "not JSON" in workers.probe()
    monkeypatch.setattr(workers, "module_command", lambda *_: ["python3", "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(workers, "PROBE_DEADLINE_S", 0.2)
    assert "no answer within" in workers.probe()
    (finding,) = workers.check_workers(workers.probe())
    assert finding.verdict is Verdict.FAIL


@pytest.mark.slow
def test_real_probe_names_what_this_installation_has():
    import torch

    facts = workers.probe()
    assert not isinstance(facts, str), facts
    assert facts["packages"]["torch"] == torch.__version__
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert "SDPA" in facts["attention"]
    if not facts["gpus"]:
        assert (facts["attention_plain"], facts["attention_fused"]) == ("SDPA", "")
