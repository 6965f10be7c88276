"""Models of transformers around models of the library: configurations, files, padding, documents, initial weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("transformers", reason="titans_pytorch.hf needs transformers, the extra hf")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.support.hf_models import NAMES, NUM_TOKENS, PAD, both, ids, left_padded, library_logits, library_model
from tests.support.titans_configurations import MODELS, SMALL
from titans_pytorch import MemoryAsContextTransformer, MemoryMLP, TitansConfig, TitansMAG
from titans_pytorch.hf import (
    MACTransformerConfig,
    MACTransformerForCausalLM,
    TitansCache,
    TitansForCausalLM,
    TitansModelConfig,
    byte_tokenizer,
    from_library,
    to_library,
)


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit, under the same names."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_library(name: str) -> None:
    library, model = both(name)
    prompt = ids(2, 9)
    with torch.no_grad():  # as the library is asked: with gradients a loop adds up in another order
        assert torch.equal(model(prompt).logits, library_logits(library, prompt))
    assert_close(model(prompt, labels=prompt).loss, library.loss(prompt).float(), check_dtype=False)
    assert torch.equal(model(prompt, logits_to_keep=2).logits, model(prompt).logits[:, -2:])
    assert torch.equal(model(prompt, logits_to_keep=torch.tensor([1, 4])).logits, model(prompt).logits[:, [1, 4]])


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_by_the_auto_classes(name: str, tmp_path: Path) -> None:
    library, model = both(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert equal_weights(loaded, model)
    assert_close(loaded(ids(2, 9)).logits, model(ids(2, 9)).logits, rtol=0, atol=1e-13)  # files lie elsewhere in memory
    features = AutoModel.from_pretrained(tmp_path)(ids(2, 9)).last_hidden_state
    assert_close(loaded.lm_head(features), loaded(ids(2, 9)).logits, rtol=0, atol=1e-13)
    assert equal_weights(to_library(loaded), library)


@pytest.mark.parametrize("name", NAMES)
def test_from_our_files_to_theirs_and_back(name: str, tmp_path: Path) -> None:
    library = library_model(name)
    library.save_pretrained(tmp_path / "ours")
    ours = type(library).from_pretrained(tmp_path / "ours")
    from_library(ours).save_pretrained(tmp_path / "theirs")
    to_library(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")).save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        first, second = tmp_path / "ours" / file, tmp_path / "again" / file
        if file == "config.json":
            assert type(library).from_pretrained(tmp_path / "again").config == ours.config
        else:
            weights, again = load_file(first), load_file(second)
            assert weights.keys() == again.keys()
            assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_settings_that_are_modules_come_back(tmp_path: Path) -> None:
    library = MemoryAsContextTransformer(
        num_tokens=NUM_TOKENS,
        dim=8,
        depth=1,
        segment_len=4,
        dim_head=4,
        heads=2,
        neural_memory_model=MemoryMLP(4, depth=1),
        neural_memory_kwargs=dict(heads=2, dim_head=4, activation=nn.SiLU()),
    ).eval()
    from_library(library).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(loaded(ids(1, 9)).logits, library(ids(1, 9)))
    assert equal_weights(to_library(loaded), library)


# ---- padding and documents


def right_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    return dict(
        input_ids=torch.stack([torch.cat((row, torch.full((longest - len(row),), PAD))) for row in rows]),
        attention_mask=torch.stack([torch.arange(longest) < len(row) for row in rows]).long(),
    )


def with_holes(rows: list[Tensor]) -> dict[str, Tensor]:
    """The same tokens, at places drawn at random."""
    columns, generator = max(len(row) for row in rows) + 4, torch.Generator().manual_seed(1)
    tokens, mask = torch.full((len(rows), columns), PAD), torch.zeros(len(rows), columns, dtype=torch.long)
    for n, row in enumerate(rows):
        places = torch.randperm(columns, generator=generator)[: len(row)].sort().values
        tokens[n, places], mask[n, places] = row, 1
    return dict(input_ids=tokens, attention_mask=mask)


@pytest.mark.parametrize("use_cache", [False, True], ids=["whole", "with cache"])
@pytest.mark.parametrize("padded", [left_padded, right_padded, with_holes])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_token_leaves_no_trace(name: str, padded: Any, use_cache: bool) -> None:
    _, model = both(name)
    rows = [ids(length, seed=length) for length in (9, 4, 1, 6)]
    batch = padded(rows)
    got = model(**batch, use_cache=use_cache, output_hidden_states=True)
    for n, row in enumerate(rows):
        alone, real = model(row[None], output_hidden_states=True), batch["attention_mask"][n].bool()
        assert_close(got.logits[n, real], alone.logits[0], rtol=0, atol=1e-12)
        assert len(got.hidden_states) == model.config.num_hidden_layers + 1
        for layer, layer_alone in zip(got.hidden_states, alone.hidden_states, strict=True):
            assert_close(layer[n, real], layer_alone[0], rtol=0, atol=1e-12)
        assert (got.logits[n, ~real] == 0).all()


@pytest.mark.parametrize("padded", [left_padded, right_padded])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_has_the_loss_and_gradients_of_its_rows(name: str, padded: Any) -> None:
    _, model = both(name)
    rows = [ids(length, seed=length) for length in (8, 3, 5)]
    batch = padded(rows)
    losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    (sum(losses) / sum(len(row) - 1 for row in rows)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(got, expected, rtol=1e-6, atol=1e-7)  # the loss itself is taken in float32


@pytest.mark.parametrize("by_positions", [True, False], ids=["positions", "bounds"])
@pytest.mark.parametrize("name", NAMES)
def test_documents_of_a_row_are_read_as_if_alone(name: str, by_positions: bool) -> None:
    _, model = both(name)
    documents = [ids(length, seed=length) for length in (7, 1, 4)]
    row = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    bounds = torch.tensor([0, 7, 8, 12], dtype=torch.int32)
    given: dict[str, Any] = dict(position_ids=positions) if by_positions else dict(cu_seq_lens_q=bounds, max_length_q=7)
    got = model(row, **given).logits[0]
    expected = torch.cat([model(document[None]).logits[0] for document in documents])
    assert_close(got, expected, rtol=0, atol=1e-12)


def test_documents_that_do_not_fit_are_refused() -> None:
    _, model = both("mag")
    with pytest.raises(ValueError, match=r"rise from 0 to the number of tokens, 4, got \[0, 3\]"):
        model(ids(1, 4), cu_seq_lens_q=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seq_lens_q does not go with past_key_values"):
        model(ids(1, 4), cu_seq_lens_q=torch.tensor([0, 4]), past_key_values=TitansCache())
    with pytest.raises(ValueError, match="seq_idx alone"):
        model(ids(1, 4), seq_idx=torch.zeros(1, 4))


def test_inputs_that_do_not_fit_are_refused() -> None:
    _, model = both("mag")
    with pytest.raises(ValueError, match=r"\(batch, tokens\), here \(2, 4\), got \(2, 1, 4, 4\)"):
        model(ids(2, 4), attention_mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"here \(2, 4\), got \(2, 3\)"):
        model(ids(2, 4), attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(ids(2, 4), output_attentions=True)


# ---- configurations


def test_sizes_are_fields_of_transformers() -> None:
    config = TitansModelConfig(variant="mac", dim=16, depth=3, heads=2, memory_chunk=4)
    fields = json.loads(config.to_json_string())
    assert (fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]) == (16, 3, 2)
    assert (config.dim, config.depth, config.heads, config.memory_chunk) == (16, 3, 2, 4)
    assert config.titans_config() == TitansConfig(16, 3, 2, memory_chunk=4)


def test_every_setting_of_the_library_is_a_field() -> None:
    assert TitansModelConfig().titans_config() == TitansConfig(dim=64, depth=2)
    model = MemoryAsContextTransformer(num_tokens=256, dim=64, depth=2, segment_len=128)
    assert MACTransformerConfig().arguments() == vars(model.config)


@pytest.mark.parametrize("config", [TitansModelConfig, MACTransformerConfig])
def test_a_misspelt_setting_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match="hiden_size is no setting of this configuration, did you mean hidden_size"):
        config(hiden_size=16)


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="variant must be one of 'mac', 'mag', 'mal', 'lmm', got 'mamba'"):
        TitansModelConfig(variant="mamba")
    with pytest.raises(ValueError, match="memory_refresh must be a multiple"):
        TitansModelConfig(memory_chunk=8, memory_refresh=12)
    with pytest.raises(Exception, match="window"):
        TitansModelConfig(window="far")


# ---- what an embedding is


@pytest.mark.parametrize("name", ["mag", "mac transformer"])
def test_embeddings_can_be_tied(name: str, tmp_path: Path) -> None:
    config = both(name)[1].config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_close(loaded(ids(1, 5)).logits, model.eval()(ids(1, 5)).logits)
    library = to_library(loaded)
    assert library.to_logits.weight is not library.token_emb.weight
    assert_close(library_logits(library, ids(1, 5)), loaded(ids(1, 5)).logits)


@pytest.mark.parametrize("name", ["mag", "mac transformer"])
def test_the_vocabulary_can_grow(name: str, tmp_path: Path) -> None:
    _, model = both(name)
    before = model(ids(1, 5)).logits
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        each.resize_token_embeddings(NUM_TOKENS + 3, mean_resizing=False)
        assert each.config.vocab_size == NUM_TOKENS + 3
        logits = each(ids(1, 5)).logits
        assert logits.shape[-1] == NUM_TOKENS + 3
        assert logits.isfinite().all()
        assert_close(logits[..., :NUM_TOKENS], before)


# ---- initial weights


def config_of(name: str) -> Any:
    if name != "mac transformer":
        return TitansModelConfig(variant=name, vocab_size=NUM_TOKENS, **SMALL)
    return MACTransformerConfig(
        vocab_size=NUM_TOKENS, dim=8, depth=2, segment_len=4, dim_head=4, heads=2, num_longterm_mem_tokens=2
    )


@pytest.mark.parametrize("name", NAMES)
def test_models_begin_as_those_of_the_library(name: str) -> None:
    """Transformers' own initialisation would forget half of the memory at every chunk, and nothing would fail."""
    config = config_of(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    library = (
        MemoryAsContextTransformer(**config.arguments())
        if name == "mac transformer"
        else MODELS[name](NUM_TOKENS, config.titans_config())
    )
    got, expected = to_library(model).state_dict(), library.state_dict()
    assert got.keys() == expected.keys()
    drawn_later = {"to_logits.weight"} if name == "mac transformer" else set()
    assert [key for key in got if not torch.equal(got[key], expected[key])] == sorted(drawn_later)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_lacks_begins_as_it_does_in_the_library(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    one, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    one.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for start in range(2):
        kept = {key: weight for n, (key, weight) in enumerate(sorted(weights.items())) if n % 2 == start}
        save_file(kept, file, metadata={"format": "pt"})
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        for key, weight in one.state_dict().items():
            again = other.state_dict()[key]
            if key in kept or torch.equal(weight, again):  # the same in every model: a bias, a zero, a one
                assert torch.equal(loaded[key], weight), key
            else:
                assert not torch.equal(loaded[key], weight), key
                assert loaded[key].isfinite().all(), key
                assert weight.numel() < 64 or 0.6 < loaded[key].std() / weight.std() < 1.6, key


def test_other_precisions_are_loaded(tmp_path: Path) -> None:
    _, model = both("mag")
    model.float().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded(ids(1, 9)).logits.isfinite().all()
    assert loaded.generate(ids(2, 5), max_new_tokens=4, do_sample=False).shape == (2, 9)


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="a map of devices needs accelerate")
    _, model = both("mag")
    model.save_pretrained(tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")(ids(1, 4)).logits.shape
    places = {"model.embed_tokens": "cpu", "model.backbone": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="device_map must not offload weights to the host or the disk, got cpu, disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")


# ---- the door


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.strip() + done.stderr.strip()[-500:]


@pytest.mark.slow
def test_the_library_does_not_import_transformers() -> None:
    assert run("import sys, titans_pytorch; print('transformers' in sys.modules)") == "False"


@pytest.mark.slow
def test_without_transformers_it_says_what_is_needed() -> None:
    code = "import sys; sys.modules['transformers'] = None; import titans_pytorch.hf"
    assert "titans_pytorch.hf needs transformers: pip install 'titans-pytorch[hf]'" in run(code)


def test_tuples_are_returned_to_whom_wants_them() -> None:
    _, model = both("mag")
    assert torch.equal(model(ids(1, 4), return_dict=False)[0], model(ids(1, 4)).logits)


def test_bytes_come_back() -> None:
    tokenizer = byte_tokenizer()
    text = "Ünïcödé — 漢字 \x00\n\t🜁 <pad>".replace("<pad>", "")
    encoded = tokenizer(text)["input_ids"]
    assert encoded == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(encoded) == text
    assert len(tokenizer) == 259
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>"]) == [0, 1, 2]


def test_configurations_are_known_by_their_type(tmp_path: Path) -> None:
    for config in (TitansModelConfig(), MACTransformerConfig()):
        config.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)


def test_only_whole_models_are_converted() -> None:
    with pytest.raises(TypeError, match="model must be a Titans model or MemoryAsContextTransformer, got Linear"):
        from_library(nn.Linear(2, 2))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="TitansForCausalLM or MACTransformerForCausalLM, got TitansModel"):
        to_library(both("mag")[1].model)
    own = MemoryAsContextTransformer(num_tokens=4, dim=8, depth=1, segment_len=4, token_emb=nn.Linear(3, 8))
    with pytest.raises(ValueError, match=r"must have its own nn\.Embedding"):
        from_library(own)


def test_weights_are_shared_by_both() -> None:
    library = TitansMAG(NUM_TOKENS, TitansConfig(**SMALL))
    model = from_library(library)
    assert isinstance(model, TitansForCausalLM)
    ours = {id(parameter) for parameter in library.parameters()}
    assert {id(parameter) for parameter in model.parameters()} == ours
    assert {id(parameter) for parameter in to_library(model).parameters()} == ours
    transformer = library_model("mac transformer")
    theirs = from_library(transformer)
    assert isinstance(theirs, MACTransformerForCausalLM)
    assert {id(p) for p in theirs.parameters()} == {id(p) for p in transformer.parameters()}


# ---- gradient checkpointing


def gradients_of(model: Any, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    model(batch, labels=batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_layers_can_be_computed_again_in_the_backward_pass(name: str) -> None:
    _, model = both(name)
    expected = gradients_of(model, ids(2, 9))
    model.gradient_checkpointing_enable()
    calls = 0

    def counting(module: nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += 1

    layers = model.model.backbone.blocks if name != "mac transformer" else model.model.transformer.layers
    for layer in layers:
        layer.register_forward_pre_hook(counting)
    got = gradients_of(model, ids(2, 9))
    assert calls == 2 * len(layers)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_checkpoints_that_cannot_follow_states_are_refused() -> None:
    _, model = both("mag")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="must have use_reentrant=False: it follows states, got True"):
        gradients_of(model, ids(2, 9))


@pytest.mark.parametrize("name", ["mag", "mac transformer"])
def test_losses_are_those_of_the_library_however_a_batch_is_made(name: str) -> None:
    """With holes the label of a token is the next real one; of documents nobody predicts the first token."""
    library, model = both(name)
    holes = with_holes([ids(8), ids(5, seed=1)])
    expected = library.loss(holes["input_ids"], attention_mask=holes["attention_mask"])
    assert_close(model(**holes, labels=holes["input_ids"]).loss, expected.float(), check_dtype=False)
    row, borders = ids(1, 12), torch.tensor([0, 5, 12])
    expected = library.loss(row, cu_seqlens=borders)
    assert_close(model(row, labels=row, cu_seq_lens_q=borders).loss, expected.float(), check_dtype=False)
