"""The example's BERT against Hugging Face's, in fp32 and under autocast, and the errors of its configuration."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from examples.minbert_multitask.model import ACTIVATIONS, BertConfig, BertModel, attention
from examples.minbert_multitask.weights import load_bert

SMALL = {
    "vocab_size": 101,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 19,
    "type_vocab_size": 2,
    "initializer_range": 0.2,  # large enough that attention is far from uniform
}


def small_reference(**changes):
    """A random `transformers.BertModel` whose every tensor is non-trivial, LayerNorms and biases included."""
    torch.manual_seed(0)
    reference = transformers.BertModel(transformers.BertConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return reference.eval()


def save_checkpoint(reference, folder):
    """What `save_pretrained` leaves behind, as far as our loader reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(reference.config.to_dict(), default=str))
    save_file({k: v.clone() for k, v in reference.state_dict().items()}, folder / "model.safetensors")


def padded_inputs(vocabulary, positions, *, seed=1):
    """Random ids `(5, positions)`, rows of different lengths (the full one and a single token among them), types."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (5, positions), generator=generator)
    lengths = torch.tensor([positions, 1, 2, positions // 2, positions - 1])
    mask = torch.arange(positions) < lengths[:, None]
    types = (torch.arange(positions) >= lengths[:, None] // 2).long()
    return ids * mask, mask, types


def assert_as_good_as(actual, reference, oracle):
    """`actual` is as near to the fp64 `oracle` as the fp32 `reference` is, within a factor of two and a rounding."""
    oracle = oracle.double()
    budget = 2 * ((reference.double() - oracle).abs().max() + torch.finfo(reference.dtype).eps * oracle.abs().max())
    assert torch.isfinite(actual).all()
    assert (actual.double() - oracle).abs().max() <= budget


@torch.no_grad()
def compare(reference, model, ids, mask, types):
    """Hidden states at real tokens, and the pooler where there is one, against Hugging Face's in fp32 and fp64."""
    expected = reference(ids, attention_mask=mask.long(), token_type_ids=types)
    oracle = reference.double()(ids, attention_mask=mask.long(), token_type_ids=types)
    reference.float()
    hidden = model(ids, mask, types)
    assert_as_good_as(hidden[mask], expected.last_hidden_state[mask], oracle.last_hidden_state[mask])
    if model.pooler is not None:
        assert_as_good_as(model.pooled(hidden), expected.pooler_output, oracle.pooler_output)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_equals_transformers(tmp_path, activation):
    reference = small_reference(hidden_act=activation)
    save_checkpoint(reference, tmp_path)
    model, folder = load_bert(tmp_path, pooler=True)
    assert folder == tmp_path
    assert list(model.state_dict()) == list(reference.state_dict())
    compare(reference, model, *padded_inputs(SMALL["vocab_size"], SMALL["max_position_embeddings"]))


def test_minilm_equals_transformers():
    model, folder = load_bert("minilm", pooler=True)
    reference = transformers.BertModel.from_pretrained(folder).eval()
    compare(reference, model, *padded_inputs(30522, 23))


def test_gradients_equal_transformers(tmp_path):
    reference = small_reference(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    save_checkpoint(reference, tmp_path)
    model, _ = load_bert(tmp_path)
    ids, mask, types = padded_inputs(SMALL["vocab_size"], SMALL["max_position_embeddings"])

    def gradients(network):
        network.zero_grad()
        if network is model:
            hidden = network(ids, mask, types)
        else:
            hidden = network(ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
        hidden[mask].square().mean().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    ours, theirs, oracle = gradients(model), gradients(reference), gradients(reference.double())
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name in ours:
        if name.endswith("key.bias"):  # exactly 0: softmax does not see what all keys have in common
            oracle[name].zero_()
        assert_as_good_as(ours[name], theirs[name], oracle[name])


def test_token_types_default_to_the_first_sentence_and_masks_may_be_numbers():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)).eval()
    ids, mask, _ = padded_inputs(SMALL["vocab_size"], 7)
    expected = model(ids, mask, torch.zeros_like(ids))
    assert torch.equal(model(ids, mask), expected)
    assert torch.equal(model(ids, mask.float()), expected)


def test_padding_does_not_reach_the_tokens():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)).eval()
    ids, mask, types = padded_inputs(SMALL["vocab_size"], 7)
    garbage = torch.where(mask, ids, 5)
    assert torch.equal(model(ids, mask, types)[mask], model(garbage, mask, types)[mask])


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_attends_in_bfloat16(monkeypatch, grad):
    seen = []

    def watch(q, k, v, mask, dropout):
        out = attention(q, k, v, mask, dropout)
        seen.append({q.dtype, k.dtype, v.dtype, out.dtype})
        return out

    monkeypatch.setattr("examples.minbert_multitask.model.attention", watch)
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)).eval()
    inputs = padded_inputs(SMALL["vocab_size"], 7)
    outputs = []
    for layer in model.encoder.layer:
        layer.intermediate.activation.register_forward_hook(lambda m, args, out: outputs.append(out.dtype))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        hidden = model(*inputs)
    assert seen == [{torch.bfloat16}] * SMALL["num_hidden_layers"]
    assert outputs == [torch.bfloat16] * SMALL["num_hidden_layers"]
    # the stream between the layers stays fp32, as autocast's sums and LayerNorms leave it
    assert hidden.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_attention_is_as_good_as_the_formula(dtype, dropout):
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(3, 4, 11, 8, dtype=dtype) for _ in range(4))
    mask = (torch.arange(11) < torch.tensor([11, 1, 6])[:, None])[:, None, None, :]

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        torch.manual_seed(1)
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    def by_hand(q, k, v):  # what the lines compute, with nothing chosen for speed
        p = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        return (p * F.dropout(torch.ones_like(p, dtype=dtype), dropout)) @ v

    ours = run(lambda q, k, v: attention(q, k, v, mask, dropout), dtype)
    for actual, eager, oracle in zip(ours, run(by_hand, dtype), run(by_hand, torch.float64), strict=True):
        assert actual.dtype == dtype
        assert_as_good_as(actual, eager, oracle)


def test_plain_attention_saves_no_copy_of_what_it_is_given():
    q, k, v = (torch.randn(2, 5, 3, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        attention(*(t.transpose(1, 2) for t in (q, k, v)), torch.ones(2, 1, 1, 5, dtype=torch.bool), 0.0)
    known = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    assert [tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in known] == [(2, 3, 5, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_dropout_acts_in_training_only(dtype):
    torch.manual_seed(0)
    changes = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    model = BertModel(BertConfig(**{**SMALL, **changes})).to(dtype)
    inputs = padded_inputs(SMALL["vocab_size"], 9)
    assert not torch.equal(model.train()(*inputs), model(*inputs))
    assert torch.equal(model.eval()(*inputs), model(*inputs))


def test_every_linear_is_called_as_a_module():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL), pooler=True)
    called = set()
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    for name in linears:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    ids, mask, types = padded_inputs(SMALL["vocab_size"], 5)
    model.pooled(model(ids, mask, types))
    assert called == linears
    assert len(linears) == 6 * SMALL["num_hidden_layers"] + 1


def test_a_layer_compiles_into_one_graph():
    torch.manual_seed(0)
    layer = BertModel(BertConfig(**SMALL)).eval().encoder.layer[0]
    x, mask = torch.randn(2, 5, SMALL["hidden_size"]), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, mask), layer(x, mask))


def test_random_weights_have_bert_initialisation():
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=64))
    assert not model.embeddings.word_embeddings.weight[0].any()
    assert not model.encoder.layer[0].output.dense.bias.any()
    weights = model.embeddings.word_embeddings.weight[1:]
    # the standard deviation of n normal values is off by its own 1/√(2n); five of those is never
    assert abs(weights.std().item() / 0.02 - 1) < 5 / (2 * weights.numel()) ** 0.5


def test_pooled_needs_the_pooler():
    model = BertModel(BertConfig(**SMALL))
    with pytest.raises(RuntimeError, match=r"has no pooler; build or load it with pooler=True, or pool by the mean"):
        model.pooled(torch.zeros(1, 1, SMALL["hidden_size"]))


def test_too_long_a_sequence_is_an_error():
    model = BertModel(BertConfig(**SMALL))
    ids = torch.zeros(1, 20, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a sequence of 20 tokens is longer than the model's 19 positions; truncate"):
        model(ids, torch.ones_like(ids))


def test_heads_must_share_the_hidden_size():
    with pytest.raises(ValueError, match=r"hidden_size 24 is not a multiple of num_attention_heads 5"):
        BertConfig(**{**SMALL, "num_attention_heads": 5})


def test_unknown_activation_is_an_error():
    with pytest.raises(ValueError, match=r"hidden_act 'quick_gelu' is not one of gelu, gelu_fast") as caught:
        BertConfig(**SMALL, hidden_act="quick_gelu")
    assert all(name in str(caught.value) for name in ACTIVATIONS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        (json.dumps({"hidden_size": 8}), "lacks vocab_size, num_hidden_layers, num_attention_heads, intermediate_size"),
        (json.dumps(SMALL | {"model_type": "roberta"}), "has model_type 'roberta'; this model computes model_type 'b"),
        (json.dumps(SMALL | {"position_embedding_type": "relative_key"}), "position_embedding_type 'absolute' only"),
        (json.dumps(SMALL | {"is_decoder": True}), "has is_decoder True; this model computes is_decoder False only"),
    ],
)
def test_configuration_errors(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        BertConfig.from_json(tmp_path / "config.json")


def test_missing_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no BERT configuration at .*config\.json"):
        BertConfig.from_json(tmp_path / "config.json")


def test_configuration_reads_sizes_and_ignores_the_rest(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"use_cache": True, "hidden_act": "relu"}))
    assert BertConfig.from_json(tmp_path / "config.json") == BertConfig(**SMALL, hidden_act="relu")
