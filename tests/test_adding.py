"""docs/adding.md is followed: its places exist, its tables agree, and a device, a loss and a recipe are added by it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from command import Command, refused
from pydantic import Field, create_model

from edgedistill.config.recipe import LossWeights, load_recipe
from edgedistill.export.stage import EXPORTERS
from edgedistill.losses import divergences, loss_spec
from edgedistill.losses.block_losses import Dense, block_loss
from edgedistill.losses.divergences import DIVERGENCES, Pair
from edgedistill.losses.loss_spec import LossSpec
from edgedistill.quantization.kinds import ARTIFACTS, RUNTIMES_OF
from edgedistill.runtimes.worker import BACKENDS
from edgedistill.verify.limits import QUANTIZING

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
PLACES = sorted(set(re.findall(r"`((?:edgedistill|targets|tests|docs)/[\w/.]*)(?:::(\w+))?`", PAGE)))


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_every_place_exists(path: str, name: str) -> None:
    assert (ROOT / path).exists(), path
    if name:
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        assert hasattr(module, name)


def test_the_page_names_places_for_all_that_can_be_added() -> None:
    assert len(PLACES) > 30
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    for what in ("task", "loss", "family", "format", "device", "host"):
        assert any(what in title for title in titles), what


def test_a_device(tmp_path: Path) -> None:
    command = Command(tmp_path, warm=True)
    profile = yaml.safe_load((ROOT / "targets" / "raspberry-pi-5.yaml").read_text())
    profile |= {"name": "my-board", "aliases": ["board"]}
    path = tmp_path / "my-board.yaml"
    path.write_text(yaml.safe_dump(profile))
    checked = command("targets", "check", str(path))
    assert checked.returncode == 0, checked.stderr
    planned = command.json("plan", command.recipe(), "--target", str(path))
    assert planned["targets"] == ["my-board"]
    del profile["memory_bytes"]["basis"]
    path.write_text(yaml.safe_dump(profile))
    refused(command("targets", "check", str(path)), "memory_bytes", "basis")


def test_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndata: {source: text.txt}\ndistill: {jsd: 0.5}\n")
    recipe = load_recipe(str(path), ["distill.epochs=2"])
    assert (recipe.distill.jsd, recipe.distill.epochs, recipe.distill.needs_teacher) == (0.5, 2, True)


def test_every_loss_has_a_weight_in_the_recipe_and_the_other_way_round() -> None:
    assert set(LossWeights.model_fields) == {*DIVERGENCES, "cross_entropy"}


def test_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """½ Σ (p − q)² in the two tables: the mix takes it, and its gradient is autograd's."""

    def squared(pair: Pair, parameter: float) -> divergences.Parts:
        difference = pair.q - pair.p
        return 0.5 * difference.square().sum(-1), divergences._from_q(pair.q, difference)

    monkeypatch.setitem(DIVERGENCES, "squared", squared)
    monkeypatch.setattr(loss_spec, "NAMES", (*loss_spec.NAMES, "squared"))
    weights = create_model("Weights", __base__=LossWeights, squared=(float, Field(2.0, ge=0)))
    assert weights().squared == 2.0 and set(weights.model_fields) - {"squared"} == set(LossWeights.model_fields)
    torch.manual_seed(0)
    student = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    teacher, targets = torch.randn(5, 11, dtype=torch.float64), torch.randint(0, 11, (5,))
    spec = LossSpec({"squared": 2.0}, temperature=1.0, vocab=11)
    values, gradient = block_loss(
        student.detach().clone(), [Dense(teacher.clone(), 1.0)], targets, spec, torch.ones(5, dtype=torch.float64),
        taid_t=1.0, report_kl=False,
    )  # fmt: skip
    slow = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)
    (2.0 * slow.sum()).backward()
    torch.testing.assert_close(values["squared"], slow.detach())
    torch.testing.assert_close(gradient, student.grad)


def test_the_tables_of_formats_agree() -> None:
    assert set(EXPORTERS) == set(ARTIFACTS) == set(RUNTIMES_OF)
    unread = {runtime for runtime in RUNTIMES_OF.values() if runtime not in BACKENDS}
    assert unread == {"executorch"}  # its programs are run by an interpreter of their own
    for format_, quantizations in QUANTIZING.items():
        assert set(quantizations) <= set(ARTIFACTS[format_])
