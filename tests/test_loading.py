"""What a user may name as a model."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qsparse_hf.cli import main
from qsparse_hf.errors import UserError
from qsparse_hf.loading import load_checkpoint


@pytest.fixture
def adapters(tiny_checkpoint, tiny_tokenizer, tmp_path):
    """A folder of adapters that change their base model, and the two merged."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapters")
    tiny_tokenizer.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", adapted.merge_and_unload()


@torch.no_grad()
def test_adapters_are_merged(adapters, tiny_checkpoint, tokens):
    folder, merged = adapters
    base, _ = load_checkpoint(str(tiny_checkpoint), device="cpu")
    found, _ = load_checkpoint(str(folder), device="cpu")
    torch.testing.assert_close(found(tokens).logits, merged(tokens).logits)
    assert not torch.allclose(found(tokens).logits, base(tokens).logits, atol=0.1)
    assert load_checkpoint(str(folder), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_adapters_compare_with_their_base(adapters, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    options = ["--device", "cpu", "--text", str(tmp_path / "a.txt"), "--output", str(tmp_path / "c.json")]
    assert main(["compare", str(tiny_checkpoint), str(adapters[0]), *options]) == 0
    base, adapted = json.loads((tmp_path / "c.json").read_text())["results"]
    weights = (adapters[0] / "adapter_model.safetensors").stat().st_size
    assert adapted["bytes_on_disk"] == base["bytes_on_disk"] + weights
    assert adapted["parameters"] == base["parameters"]


def test_pickled_weights_are_not_read(adapters, tiny_checkpoint, tiny_tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tiny_tokenizer.save_pretrained(tmp_path / "pickled")
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file named model.safetensors"):
        load_checkpoint(str(tmp_path / "pickled"))
    weights = adapters[0] / "adapter_model.safetensors"
    torch.save(load_file(weights), adapters[0] / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"lacks adapter_model.safetensors; adapters in other formats are not read"):
        load_checkpoint(str(adapters[0]))


def test_adapters_of_a_missing_model_are_named(adapters, tiny_checkpoint):
    file = adapters[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(UserError, match=r"adapters: its base model ./gone: is no file or folder here"):
        load_checkpoint(str(adapters[0]))
