"""The forms of weights in checkpoints: there and back, to and from Transformers' own BitNet, and what is refused."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, assert_close, dense_config, make, run_python, sparse_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights

from qsparse_hf.cli import main
from qsparse_hf.conversion import convert_checkpoint
from qsparse_hf.errors import UserError
from qsparse_hf.loading import load_checkpoint
from qsparse_hf.modeling.bitnet import PackedLinear, TernaryLinear, pack, ternary, unpack
from qsparse_hf.report import count_weights, projections, sparsity_report
from qsparse_hf.weights import make_plain, projection_names

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | kwargs).eval()


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of a checkpoint in one file; None removes one."""
    held = load_file(folder / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / WEIGHTS, {"format": "pt"})


def set_config(folder: Path, **fields) -> None:
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(described | fields))


@pytest.fixture
def dense(family, tmp_path):
    make(dense_config(family)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A packed Q-Sparse Llama in one file; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("packed")
    make(dense_config("llama")).save_pretrained(folder / "dense")
    convert_checkpoint(folder / "dense", folder / "packed", weights="packed", activation_quantization="int8")
    return folder / "packed"


@pytest.fixture
def broken(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "broken"))


@pytest.fixture
def eager():
    """Transformers' BitNet layers compile parts of themselves, which takes a C++ compiler and its time."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_a_dense_checkpoint_in_each_form_is_one_model(family, dense, tmp_path, tokens, max_shard_size):
    logits = {}
    for form in ("ternary", "packed", "plain"):
        plan = convert_checkpoint(dense, tmp_path / form, weights=form, sparsity=0, max_shard_size=max_shard_size)
        model = load(tmp_path / form)
        logits[form] = model(tokens).logits
        files = [load_file(file) for file in (tmp_path / form).glob("*.safetensors")]
        stored = {name: tensor for file in files for name, tensor in file.items()}
        assert plan.size == sum(tensor.nbytes for tensor in stored.values())
        assert stored.keys() == {name for name in model.state_dict() if name not in model.all_tied_weights_keys}
        assert plan.parameters == count_weights(model) == count_weights(load(dense))
        kind = {"ternary": TernaryLinear, "packed": PackedLinear, "plain": nn.Linear}[form]
        assert {type(linear) for _, _, linear in projections(model)} == {kind}
        bits = {"ternary": "(ternary, 32.00 bits each", "packed": "(packed, 2.0", "plain": "(32.00 bits each"}
        assert bits[form] in str(plan)
        if form == "packed":
            assert 7 * plan.projection_size <= 2 * plan.projection_parameters
        assert (model.config.weight_quantization, model.config.packed_as) == {
            "ternary": ("ternary", None),
            "packed": ("ternary", "bitlinear"),
            "plain": ("none", None),
        }[form]
    weights = load(tmp_path / "ternary").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in load(dense).state_dict().items())
    assert_close(logits["packed"], logits["ternary"])
    assert_close(logits["plain"], logits["ternary"])


def test_a_model_survives_every_way_between_the_forms(tmp_path, packed):
    """Codes and scales of the first are those of the last; masters made of codes have the scale as their mean."""
    before = load_file(packed / WEIGHTS)
    source = packed
    for step, form in enumerate(["plain", "packed", "ternary", "packed", "ternary", "plain", "packed"]):
        convert_checkpoint(source, tmp_path / str(step), weights=form)
        source = tmp_path / str(step)
        assert AutoConfig.from_pretrained(source).activation_quantization == "int8"
        held = load_file(source / WEIGHTS)
        for name in projection_names(AutoConfig.from_pretrained(packed)):
            codes = unpack(before[f"{name}.weight"], torch.float32)
            alpha = 1 / before[f"{name}.weight_scale"]
            weight = held[f"{name}.weight"]
            if form == "packed":
                assert torch.equal(weight, before[f"{name}.weight"])
                torch.testing.assert_close(
                    held[f"{name}.weight_scale"], before[f"{name}.weight_scale"], rtol=1e-6, atol=0
                )
                if step < 2:  # by way of plain weights
                    assert torch.equal(held[f"{name}.weight_scale"], before[f"{name}.weight_scale"])
            elif form == "plain":
                assert torch.equal(weight.sign(), codes)
                if step < 2:
                    assert torch.equal(weight, codes * alpha)
            else:
                found, mean = ternary(weight)
                assert torch.equal(found, codes)
                torch.testing.assert_close(mean, alpha.squeeze(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_codes_stay_and_scales_are_rounded(tmp_path, packed, tokens, dtype):
    before = load_file(packed / WEIGHTS)
    for form in ("plain", "ternary"):
        convert_checkpoint(packed, tmp_path / form, weights=form, dtype=dtype)
        held = load_file(tmp_path / form / WEIGHTS)
        convert_checkpoint(tmp_path / form, tmp_path / f"{form}-packed", weights="packed")
        again = load_file(tmp_path / f"{form}-packed" / WEIGHTS)
        for name in projection_names(AutoConfig.from_pretrained(packed)):
            assert held[f"{name}.weight"].dtype == getattr(torch, dtype)
            assert torch.equal(again[f"{name}.weight"], before[f"{name}.weight"])
            torch.testing.assert_close(again[f"{name}.weight_scale"], before[f"{name}.weight_scale"], rtol=8e-3, atol=0)
        assert load(tmp_path / f"{form}-packed").dtype == getattr(torch, dtype)


def test_settings_stay_unless_given(tmp_path):
    config = sparse_config(
        "llama", sparsity=0.25, sparsity_per_projection={"down": [0.5, 0.75]}, sparsity_block_size=16
    )
    make(config).save_pretrained(tmp_path / "sparse")
    assert main(["convert", *map(str, (tmp_path / "sparse", tmp_path / "a")), "--weights", "packed"]) == 0
    kept = AutoConfig.from_pretrained(tmp_path / "a")
    assert (kept.sparsity, kept.sparsity_per_projection, kept.sparsity_block_size) == (0.25, {"down": [0.5, 0.75]}, 16)
    assert kept.activation_quantization == "none"
    command = ["convert", *map(str, (tmp_path / "a", tmp_path / "b")), "--weights", "ternary", "--activations", "int8"]
    assert main([*command, "--sparsity", "0.5"]) == 0
    changed = AutoConfig.from_pretrained(tmp_path / "b")
    assert (changed.sparsity, changed.sparsity_block_size, changed.activation_quantization) == (0.5, 16, "int8")
    assert (changed.weight_quantization, changed.packed_as) == ("ternary", None)


def test_a_tensor_of_zeros_goes_through_every_form(broken, tmp_path, tokens):
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(broken, **{name: torch.full_like(load_file(broken / WEIGHTS)[name], 0b01010101)})
    for form in ("ternary", "plain", "packed"):
        source = tmp_path / {"ternary": "broken", "plain": "ternary", "packed": "plain"}[form]
        convert_checkpoint(source, tmp_path / form, weights=form, sparsity=0.5)
        assert load_file(tmp_path / form / WEIGHTS)[name].unique().tolist() == [0b01010101 if form == "packed" else 0]
    before, after = (load_file(folder / WEIGHTS) for folder in (broken, tmp_path / "packed"))
    assert before.keys() == after.keys()
    after.pop(f"{name}_scale")  # of nothing but zeros it says nothing
    for key, tensor in after.items():  # a scale may be fp32's next one, of which a top-K makes another model
        assert_close(tensor.float(), before[key].float())
    assert load(tmp_path / "packed")(tokens).logits.isfinite().all()


def test_a_dry_run_says_what_is_written(dense, tmp_path, capsys):
    command = ["convert", str(dense), str(tmp_path / "out"), "--weights", "packed"]
    assert main([*command, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert capsys.readouterr().out == planned.replace("would write", "wrote")


# Transformers' own BitNet


def as_transformers(family: str, linear_class: str, mode: str, folder: Path, dtype=torch.float32, **options) -> Path:
    """A BitNet checkpoint in Transformers' format, saved by Transformers after it loaded it."""
    model = make(dense_config(family, **options), dtype=dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    if mode == "offline":
        for name in projection_names(sparse_config(family)):
            codes, alpha = ternary(tensors[f"{name}.weight"])
            tensors[f"{name}.weight"] = pack_weights(codes.clone())
            assert torch.equal(tensors[f"{name}.weight"], pack(codes))
            scale = 1 / alpha if linear_class == "bitlinear" else alpha
            tensors[f"{name}.weight_scale"] = scale.reshape(1).to(dtype)
    published = folder / "published"
    published.mkdir()
    save_file(tensors, published / WEIGHTS, {"format": "pt"})
    quantization = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode}
    (published / CONFIG).write_text(
        json.dumps(model.config.to_dict() | {"quantization_config": quantization}, default=str)
    )
    loaded = load(published, dtype=dtype)
    kind = BitLinear if linear_class == "bitlinear" else AutoBitLinear
    assert isinstance(loaded.model.layers[0].mlp.down_proj, kind)
    loaded.save_pretrained(folder / "saved", save_original_format=False)  # as its quantizer has no way back to it
    return published


FORMATS = [("bitlinear", "offline"), ("autobitlinear", "offline"), ("autobitlinear", "online")]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("family", ["llama", "qwen2", "bitnet"])
@pytest.mark.parametrize(("linear_class", "mode"), FORMATS)
def test_what_transformers_saved_gives_the_same_here(family, linear_class, mode, tmp_path, tokens):
    published = as_transformers(family, linear_class, mode, tmp_path)
    theirs = load(published, dtype=torch.float32)
    for name, module in theirs.named_modules():
        if (
            (linear_class, mode) == ("autobitlinear", "offline")
            and isinstance(module, AutoBitLinear)
            and module.bias is not None
        ):
            module.bias.data /= module.weight_scale  # it multiplies the bias too, which is no bias of the model's
            assert "self_attn" in name
    expected = theirs(tokens).logits
    for source in ("published", "saved"):
        for form in (None, "packed", "plain", "ternary"):
            output = tmp_path / f"{source}-{form}"
            convert_checkpoint(tmp_path / source, output, weights=form, sparsity=0)
            ours = load(output)
            assert ours.config.activation_quantization == "int8"
            assert_close(ours(tokens).logits, expected)
            if form is None:
                assert ours.config.packed_as == ("bitlinear" if mode == "offline" else None)
                assert ours.config.weight_quantization == "ternary"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("family", ["llama", "qwen2", "bitnet"])
@pytest.mark.parametrize("form", ["packed", "plain"])
def test_what_was_packed_here_gives_the_same_in_transformers(family, form, tmp_path, tokens):
    dense_type = family
    make(dense_config(family)).save_pretrained(tmp_path / "dense")
    convert_checkpoint(
        tmp_path / "dense", tmp_path / "ours", weights="packed", sparsity=0, activation_quantization="int8"
    )
    ours = load(tmp_path / "ours")
    if form == "packed":
        ours.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()
    else:
        convert_checkpoint(tmp_path / "ours", tmp_path / "again", weights="plain", activation_quantization="none")
        ours = load(tmp_path / "again")
    set_config(tmp_path / "again", model_type=dense_type, auto_map={}, architectures=None)
    theirs = load(tmp_path / "again", dtype=torch.float32)
    assert type(theirs).__module__.startswith("transformers.")
    assert isinstance(theirs.model.layers[0].mlp.down_proj, BitLinear) == (form == "packed")
    assert_close(ours(tokens).logits, theirs(tokens).logits)


# What is refused


def test_rows_that_do_not_fill_bytes_are_refused_by_name(tmp_path):
    make(dense_config("llama", intermediate_size=98)).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight has 98 rows"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "out", weights="packed")
    assert not (tmp_path / "out").exists()
    convert_checkpoint(tmp_path / "dense", tmp_path / "out", weights="plain")


NAME = "model.layers.1.mlp.up_proj"
ILLEGAL = torch.full((24, 64), 0b01010101, dtype=torch.uint8).index_fill_(1, torch.tensor([5]), 0b01110101)
BROKEN = {
    "an illegal code": ({"weight": ILLEGAL}, "holds a code of bits 11"),
    "a scale's shape": ({"weight_scale": torch.ones(2)}, r"has shape \(2,\)"),
    "a scale of no dimension": ({"weight_scale": torch.tensor(1.0)}, r"has shape \(\)"),
    "a scale of nought": ({"weight_scale": torch.zeros(1)}, "must be positive and finite, got 0"),
    "a negative scale": ({"weight_scale": -torch.ones(1)}, "must be positive and finite, got -1"),
    "a scale that is no number": ({"weight_scale": torch.tensor([torch.nan])}, "must be positive and finite, got nan"),
    "an infinite scale": ({"weight_scale": torch.tensor([torch.inf])}, "must be positive and finite, got inf"),
    "a scale of integers": ({"weight_scale": torch.ones(1, dtype=torch.int64)}, "is of dtype I64; allowed for packed"),
    "unpacked codes": ({"weight": torch.ones(96, 64)}, "is of dtype F32; allowed for packed weights are U8"),
    "signed bytes": ({"weight": torch.ones(24, 64, dtype=torch.int8)}, "is of dtype I8; allowed for packed"),
    "another shape": (
        {"weight": torch.zeros(24, 60, dtype=torch.uint8)},
        r"\(96, 60\), but config.json asks for \(96, 64\)",
    ),
    "no scale": ({"weight_scale": None}, f"lacks {NAME}.weight_scale"),
    "no codes": ({"weight": None}, f"lacks {NAME}.weight,"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_packed_weights_are_refused_by_tensor_and_file(broken, tmp_path, fault, tiny_tokenizer):
    tensors, said = BROKEN[fault]
    rewrite(broken, **{f"{NAME}.{part}": tensor for part, tensor in tensors.items()})
    tiny_tokenizer.save_pretrained(broken)
    with pytest.raises(UserError, match=said) as converting:
        convert_checkpoint(broken, tmp_path / "out", weights="plain")
    with pytest.raises(
        UserError, match=said if "shape" not in fault or "scale" in fault else "size mismatch|mismatched|shape"
    ) as loading:
        load_checkpoint(str(broken))
    for caught in (converting, loading):
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert str(broken) in message
        assert NAME in message or fault == "another shape"
        assert WEIGHTS in message or "lacks" in message or fault == "another shape"
    assert not (tmp_path / "out").exists()
    # Transformers casts what has another dtype, so what passes as codes and a scale is taken for them.
    if fault not in ("a scale of integers", "unpacked codes", "signed bytes"):
        with pytest.raises((ValueError, RuntimeError)):
            load(broken)


def test_a_truncated_file_is_refused(broken, tmp_path):
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"{WEIGHTS} is truncated or corrupt"):
        convert_checkpoint(broken, tmp_path / "out", weights="plain")


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq' cannot be converted"),
        ({"quant_method": "bitnet", "use_rms_norm": True}, "use_rms_norm must be False"),
        (
            {"quant_method": "bitnet", "linear_class": "linear"},
            "linear_class must be one of 'bitlinear', 'autobitlinear'",
        ),
        ({"quant_method": "bitnet", "quantization_mode": "never"}, "quantization_mode must be one of"),
        ({"quant_method": "bitnet", "modules_to_not_convert": ["q_proj"]}, "modules_to_not_convert must be None or"),
        ({"quant_method": "bitnet", "modules_to_not_convert": []}, "modules_to_not_convert must be None or"),
        ({"quant_method": "bitnet", "group_size": 4}, "unknown field 'group_size'"),
        (["bitnet"], r"quantized by \"\['bitnet'\]\" cannot be converted|cannot be converted"),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qsparse_llama"])
def test_other_quantization_is_refused(broken, tmp_path, quantization, said, model_type):
    set_config(broken, quantization_config=quantization, model_type=model_type)
    with pytest.raises(UserError, match=said) as caught:
        convert_checkpoint(broken, tmp_path / "out", weights="plain")
    assert len(str(caught.value).splitlines()) == 1
    assert str(broken / CONFIG) in str(caught.value)


def test_arguments_are_checked(packed, tmp_path):
    with pytest.raises(UserError, match="weights must be one of ternary, packed, plain, got 'int4'"):
        convert_checkpoint(packed, tmp_path / "out", weights="int4")
    with pytest.raises(UserError, match="it is Q-Sparse already, and --weights writes it in another form"):
        convert_checkpoint(packed, tmp_path / "out")
    with pytest.raises(UserError, match="weight_quantization 'ternary' is not that of plain weights"):
        convert_checkpoint(packed, tmp_path / "out", weights="plain", weight_quantization="ternary")
    with pytest.raises(UserError, match="activation_quantization must be one of 'none', 'int8', got 'int4'"):
        convert_checkpoint(packed, tmp_path / "out", weights="plain", activation_quantization="int4")


@pytest.mark.parametrize("form", ["packed", "plain"])
def test_weights_that_are_no_numbers_are_not_quantized(tmp_path, form):
    model = make(dense_config("llama"))
    with torch.no_grad():
        model.get_submodule(NAME).weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=rf"{WEIGHTS}: {NAME}\.weight holds values that are not finite"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "out", weights=form)


def test_scales_that_a_form_does_not_hold_are_refused(broken, tmp_path):
    rewrite(broken, **{f"{NAME}.weight_scale": torch.tensor([1e6])})
    convert_checkpoint(broken, tmp_path / "plain", weights="plain")
    with pytest.raises(UserError, match=f"{NAME}.weight has the scale 1e-06, and ternary weights none below 1e-05"):
        convert_checkpoint(broken, tmp_path / "ternary", weights="ternary")
    rewrite(broken, **{f"{NAME}.weight_scale": torch.tensor([1e-6])})
    with pytest.raises(UserError, match=r"has the scale 1e\+06, beyond torch\.float16"):
        convert_checkpoint(broken, tmp_path / "half", weights="plain", dtype="float16")


# A packed model in use


def test_a_packed_model_saves_back_copies_and_keeps_its_scales(family, dense, tmp_path, tokens):
    convert_checkpoint(dense, tmp_path / "packed", weights="packed")
    model = load(tmp_path / "packed")
    expected = model(tokens).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(tokens).logits, expected)
    scales = {name: buffer for name, buffer in model.named_buffers() if name.endswith("weight_scale")}
    for half in (copy.deepcopy(model).to(torch.bfloat16), load(tmp_path / "packed", dtype=torch.bfloat16)):
        assert half.dtype == torch.bfloat16
        assert all(torch.equal(half.get_buffer(name), scale) for name, scale in scales.items())
        half.save_pretrained(tmp_path / "half")
        assert load_file(tmp_path / "half" / WEIGHTS)[min(scales)].dtype == torch.float32
    model.scale_sparsity(0)
    dense_logits = model(tokens).logits
    model.scale_quantization(0)  # they have no other weights
    assert torch.equal(model(tokens).logits, dense_logits)
    model.scale_sparsity(1)
    assert torch.equal(model(tokens).logits, expected)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert torch.equal(load(tmp_path / "again")(tokens).logits, expected)


def test_commands_work_on_packed_models(broken, tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(broken)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    for command in (
        ["report", broken, "--text", text],
        ["eval", broken, "--text", text],
        ["generate", broken, "a dog", "--max-new-tokens", "4"],
        ["compare", broken, "--text", text],
    ):
        assert main([str(word) for word in command]) == 0, command
    report = sparsity_report(load(broken), {"input_ids": torch.arange(3, 23)[None]})
    assert report.overall == pytest.approx(0.5)


def test_packed_models_are_not_trained(broken, tmp_path, tiny_tokenizer):
    from qsparse_hf import QSparseTrainer, QSparseTrainingArguments

    arguments = QSparseTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(UserError, match=r"packed weights are not trained; `qsparse convert .* --weights ternary`"):
        QSparseTrainer(load(broken), arguments)
    with pytest.raises(UserError, match="packed weights are not trained"):
        QSparseTrainer(args=arguments, model_init=lambda: load(broken))
    assert not (tmp_path / "run").exists()


def test_a_recipe_does_not_train_packed_weights(broken, tmp_path, tiny_tokenizer):
    from qsparse_hf.training.run import train

    tiny_tokenizer.save_pretrained(broken)
    (tmp_path / "text.txt").write_text("A text. " * 100)
    recipe = {"stage": "continue", "model": str(broken), "output_dir": str(tmp_path / "run"), "max_steps": 1}
    recipe |= {"train_data": [str(tmp_path / "text.txt")], "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=f"{broken}: packed weights are not trained"):
        train(str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "run").exists()


def test_adapters_do_not_take_packed_projections(broken, tokens):
    with pytest.raises(ValueError, match="PackedLinear"):
        get_peft_model(load(broken), LoraConfig(target_modules=["q_proj"]))
    adapted = get_peft_model(load(broken), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    expected = adapted(tokens).logits
    assert_close(adapted.merge_and_unload()(tokens).logits, expected)


@pytest.mark.parametrize("form", ["ternary", "packed"])
def test_made_plain_it_is_the_same_model(family, dense, tmp_path, tokens, form):
    convert_checkpoint(dense, tmp_path / form, weights=form, sparsity=0.25)
    model = load(tmp_path / form)
    expected = model(tokens).logits
    make_plain(model)
    assert {type(linear) for _, _, linear in projections(model)} == {nn.Linear}
    assert_close(model(tokens).logits, expected)
    model.save_pretrained(tmp_path / "plain")
    assert_close(load(tmp_path / "plain")(tokens).logits, expected)


def test_adapters_of_a_ternary_model_are_merged_into_plain_weights(tmp_path, tokens, tiny_tokenizer):
    """A merged weight would be quantized again, and what the adapters learnt mostly be lost."""
    make(sparse_config("llama", weight_quantization="ternary", sparsity=0.25)).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(load(tmp_path / "base"), config).eval()
    expected = adapted(tokens).logits
    adapted.save_pretrained(tmp_path / "adapters")
    tiny_tokenizer.save_pretrained(tmp_path / "adapters")
    merged, _ = load_checkpoint(str(tmp_path / "adapters"))
    assert_close(merged(tokens).logits, expected)
    with pytest.raises(ValueError, match=r"adapters were merged into .*, whose ternary weight would lose them"):
        copy.deepcopy(adapted).merge_and_unload()
    assert_close(copy.deepcopy(adapted).unload()(tokens).logits, load(tmp_path / "base")(tokens).logits)
    make_plain(adapted)
    assert_close(adapted(tokens).logits, expected)
    alone = adapted.merge_and_unload()
    assert_close(alone(tokens).logits, expected)
    alone.save_pretrained(tmp_path / "merged")
    assert_close(load(tmp_path / "merged")(tokens).logits, expected)
    assert isinstance(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapters"), PeftModel)


REMOTE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens, *folders = sys.argv[1:]
sys.modules["qsparse_hf"] = None  # as if it were not installed
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__
    save_file({"logits": model(load_file(tokens)["tokens"]).logits}, folder + "-logits")
"""


def test_packed_folders_load_without_this_package(tmp_path, tokens):
    save_file({"tokens": tokens}, tmp_path / "tokens")
    folders = []
    for family in FAMILIES:
        make(dense_config(family)).save_pretrained(tmp_path / "dense" / family)
        for form in ("packed", "ternary"):
            folders.append(tmp_path / f"{family}-{form}")
            convert_checkpoint(tmp_path / "dense" / family, folders[-1], weights=form, activation_quantization="int8")
    run_python(REMOTE, tmp_path / "tokens", *folders, HF_MODULES_CACHE=str(tmp_path / "modules"))
    for folder in folders:
        assert torch.equal(load_file(f"{folder}-logits")["logits"], load(folder)(tokens).logits), folder.name


PEAK = """
import json, re, sys, torch
import qsparse_hf
from transformers import AutoModelForCausalLM
from qsparse_hf.conversion import convert_checkpoint
small, large, reading = sys.argv[1:]

def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

model = AutoModelForCausalLM.from_pretrained(small, dtype="auto")  # imports all that loading does
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the highest is the present one now
if reading == "load":
    model = AutoModelForCausalLM.from_pretrained(large, dtype="auto")
else:
    convert_checkpoint(large, large + "-" + reading, weights=reading, max_shard_size="50MB")
print(json.dumps(memory("VmHWM") - before))
"""


def test_memory_is_that_of_the_packed_weights(packed, tmp_path):
    """245 million weights in the projections: 61 MB packed, 490 MB in bf16; the largest tensor 4 MB, and 34 MB."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    config = sparse_config("llama", **sizes, weight_quantization="ternary")
    config.packed_as = "bitlinear"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.weight.fill_(0b10000100)
    model.save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / WEIGHTS).stat().st_size
    del model
    peak = json.loads(run_python(PEAK, packed, tmp_path / "large", "load").stdout)
    assert 0.8 * size < peak < size + 34e6, (peak, size)
    peak = json.loads(run_python(PEAK, packed, tmp_path / "large", "plain").stdout)
    assert peak < 50e6 + 3 * 34e6, peak  # a shard, and a tensor on its way
