"""The ratios of a calibration against hand-computed ones, its curves against divergences, and the command."""

import json
import math

import pytest
import torch
from conftest import dense_config, make, sparse_config
from transformers import AutoModelForCausalLM

from qsparse_hf import evaluate_perplexity, sparsity_report
from qsparse_hf.calibration import GRID, Calibration, calibrate, loss_at, refined, sparsified
from qsparse_hf.cli import main
from qsparse_hf.modeling.configuration_qsparse import GROUPS

ROWS = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(0))


def parabolas(*heights: float) -> dict[str, torch.Tensor]:
    """For each group one layer, whose cost is its height times the square of the sparsity."""
    grid = torch.tensor(GRID, dtype=torch.float64)
    return {group: height * grid.square()[None] for group, height in zip(GROUPS, heights, strict=True)}


def test_slopes_for_each_weight_are_equal():
    """Minimise the sum of h s^2 with the mean over weights fixed: h s / weights is the same everywhere."""
    found = Calibration(parabolas(1, 2, 4, 1), dict(zip(GROUPS, (100, 100, 100, 200), strict=True)), tokens=1)
    # s = price * (100/1, 100/2, 100/4, 200/1), and (s1 + s2 + s3 + 2 s4) / 5 = 0.3 makes the price 1.5 / 575
    expected = [1.5 / 575 * weights for weights in (100, 50, 25, 200)]
    ratios = [ratio for group in found.ratios(0.3).values() for ratio in group]
    assert ratios == pytest.approx(expected, abs=0.006)  # half a step of the grid, and the interpolation
    assert sum(r * w for r, w in zip(ratios, (1, 1, 1, 2), strict=True)) / 5 == pytest.approx(0.3, abs=1e-4)
    heavier = Calibration(found.curves, found.parameters, 1, importance=dict(zip(GROUPS, (4, 2, 1, 4), strict=True)))
    ratios = [ratio for group in heavier.ratios(0.3).values() for ratio in group]
    assert ratios[0] == pytest.approx(ratios[1], abs=0.006) == pytest.approx(ratios[2], abs=0.006)


@pytest.mark.parametrize("sparsity", [0, 0.4, 0.95])
def test_the_mean_is_what_was_asked_for_where_curves_are_not_convex(sparsity):
    generator = torch.Generator().manual_seed(1)
    curves = {group: torch.rand(3, len(GRID), generator=generator, dtype=torch.float64) for group in GROUPS}
    ratios = Calibration(curves, dict.fromkeys(GROUPS, 10), tokens=1).ratios(sparsity)
    assert sum(map(sum, ratios.values())) / 12 == pytest.approx(sparsity, abs=1e-4)
    with pytest.raises(ValueError, match=r"at most 0\.95, got 0\.96"):
        Calibration(curves, dict.fromkeys(GROUPS, 10), tokens=1).ratios(0.96)


@pytest.mark.parametrize("block_size", [None, 16])
def test_curves_are_divergences(family, block_size):
    """Of one group at a time, while they are small; of drawn tokens, so within a third."""
    model, rows = make(dense_config(family)), ROWS.repeat(8, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = calibrate(model, rows, block_size)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with torch.no_grad():
        dense = model(rows).logits.log_softmax(-1)
        for group in GROUPS:
            ratios = {each: [0.1 if each == group else 0.0] * 2 for each in GROUPS}
            with sparsified(model, ratios, block_size):
                sparse = model(rows).logits.log_softmax(-1)
            divergence = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
            assert found.curves[group][:, 10].sum().item() == pytest.approx(divergence, rel=0.35), group
    assert all((curves[:, 0] == 0).all() for curves in found.curves.values())


def test_sparsified_is_the_twin(family, tokens):
    ratios = {"qkv": [0.25, 0.5], "o": [0.0, 0.5], "gate_up": [0.75, 0.25], "down": [0.5, 0.125]}
    dense = make(dense_config(family))
    twin = make(sparse_config(family, sparsity_per_projection=ratios))
    twin.load_state_dict(dense.state_dict())
    with torch.no_grad(), sparsified(dense, ratios):
        assert torch.equal(dense(tokens).logits, twin(tokens).logits)
    with torch.no_grad():
        assert not torch.equal(dense(tokens).logits, twin(tokens).logits)


def test_groups_weigh_what_lowers_the_loss():
    model = make(dense_config("llama"))
    wrong = Calibration(parabolas(1, 1, 1, 1e-4), dict.fromkeys(GROUPS, 1), 1)  # as if down could be dropped
    wrong = Calibration({group: curve.expand(2, -1) for group, curve in wrong.curves.items()}, wrong.parameters, 1)
    better = refined(wrong, model, ROWS, 0.5)
    assert loss_at(model, better.ratios(0.5), ROWS, None) < loss_at(model, wrong.ratios(0.5), ROWS, None)


def test_the_command_converts_at_the_ratios(tmp_path, tiny_tokenizer, capsys):
    make(dense_config("llama", max_position_embeddings=32)).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["the quick brown fox jumps over the lazy dog."] * 20))
    other = tmp_path / "other.txt"
    other.write_text("How vexingly quick daft zebras jump! " * 20)
    source, output = str(tmp_path / "dense"), tmp_path / "sparse"
    command = [
        "calibrate",
        source,
        str(output),
        "--text",
        str(text),
        str(other),
        "--sparsity",
        "0.45",
        "--tokens",
        "256",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "of the gap removed" in said
    model = AutoModelForCausalLM.from_pretrained(output)
    assert sparsity_report(model, ROWS[:2]).overall == pytest.approx(0.45, abs=0.01)  # K is whole
    facts = json.loads((output / "calibration.json").read_text())
    assert facts["sparsity_per_projection"] == model.config.sparsity_per_projection
    assert set(facts["losses"]) == {"0.25", "0.4", "0.45", "0.5"}
    # Half of the 256 tokens are of each text; every fourth window is held back.
    ids = [*tiny_tokenizer(text.read_text())["input_ids"][:128], *tiny_tokenizer(other.read_text())["input_ids"][:128]]
    held_back = torch.tensor(ids).view(8, 32)[3::4]
    dense = AutoModelForCausalLM.from_pretrained(source)
    uniform = AutoModelForCausalLM.from_pretrained(output, sparsity=0.45, sparsity_per_projection=None)
    for name, each in (("dense", dense), ("uniform", uniform), ("calibrated", model)):
        assert facts["losses"]["0.45"][name] == pytest.approx(evaluate_perplexity(each, held_back).loss, abs=1e-4)
    card = (output / "README.md").read_text()
    assert "Converted at calibrated ratios, without training, from a local model" in card
    figures = " | ".join(f"{facts['losses']['0.45'][name]:.4f}" for name in ("dense", "uniform", "calibrated"))
    assert f"| held-back text of the calibration | {figures} |\n\nOn 64 tokens;" in card
    losses = facts["losses"]["0.25"]
    dense_ppl, uniform_ppl, ppl = (math.exp(losses[name]) for name in ("dense", "uniform", "calibrated"))
    removed = f"{100 * (uniform_ppl - ppl) / (uniform_ppl - dense_ppl):.0f} %" if uniform_ppl > dense_ppl else ""
    assert (
        f"| 0.25 | {losses['uniform']:.4f} | {uniform_ppl:.2f} | {losses['calibrated']:.4f} | {ppl:.2f} | {removed} |"
        in said
    )
    for more, said in (
        (["--sparsity", "0.95"], "at most 0.9 to be calibrated, got 0.95"),
        (["--tokens", "100"], "tokens must be at least 4 windows of 32, got 100"),
        (["--block-size", "48"], "sparsity_block_size"),
        ([], "--overwrite"),
    ):
        place = str(output) if not more else str(tmp_path / "other")
        assert main(["calibrate", source, place, "--text", str(text), *more]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    assert main(["calibrate", str(output), str(tmp_path / "other"), "--text", str(text)]) == 1
    assert "qsparse_llama" in capsys.readouterr().err
