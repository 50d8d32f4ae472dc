"""Names and values that a Q-Sparse configuration takes, and those that it refuses rather than ignores."""

import copy
import json
import pickle

import pytest
from conftest import make, sparse_config
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sparsity_blocksize", "did you mean sparsity_block_size"),
        ("sparsity_reskale", "did you mean sparsity_rescale"),
        ("Sparsity", "did you mean sparsity"),
        ("sparse_block_size", "did you mean sparsity_block_size"),
        ("weight_quant", "did you mean weight_quantization"),
        ("activation_quant", "did you mean activation_quantization"),
    ],
)
def test_a_name_like_ours_that_is_no_field_is_refused_wherever_it_comes_in(family, tmp_path, name, said):
    with pytest.raises(ValueError, match=said):
        sparse_config(family, **{name: 32})
    config = sparse_config(family)
    with pytest.raises(ValueError, match=said):
        setattr(config, name, 32)
    make(config).save_pretrained(tmp_path)
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=said):
            auto.from_pretrained(tmp_path, **{name: 32})
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {name: 32}))
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=said):
            auto.from_pretrained(tmp_path)


def test_every_other_way_of_a_configuration_keeps_its_fields(family, tmp_path):
    config = sparse_config(family, sparsity=0.25, sparsity_per_projection={"o": 0.5}, a_key_of_the_users=3)
    config.save_pretrained(tmp_path)
    for same in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        type(config)(**config.to_dict()),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert (same.sparsity, same.sparsity_per_projection, same.a_key_of_the_users) == (0.25, {"o": 0.5}, 3)
    assert AutoConfig.from_pretrained(tmp_path, sparsity=0.75).sparsity == 0.75
    assert AutoConfig.from_pretrained(tmp_path, unknown=1, return_unused_kwargs=True)[1] == {"unknown": 1}
    make(config).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, sparsity=0.75).config.sparsity == 0.75
