"""Where completions end and what is sampled from: stop strings of every kind, lines of prompts, cold temperatures."""

import dataclasses
import json

import jax
import pytest
from helpers.tiny_tokenizers import CHATML, byte_level, llama_like

from train.evaluate.harness import Requests
from train.evaluate.settings import Evaluation
from train.generate import rollout as rollouts
from train.generate import run
from train.generate.engine import Decoding
from train.generate.rollout import Prompt, rollout
from train.generate.settings import SampleOptions, Settings
from train.generate.slots import Completion
from train.generate.stops import Stops
from train.improve.settings import Sampling
from train.log import UserError
from train.models.config import ModelConfig
from train.models.open import Model, random_config, random_model
from train.models.tokenizer import Tokenizer
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip


def byte_tokenizer(**given):
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return Tokenizer(byte_level(), names, **{"chat_template": CHATML, **given})


def scripted(monkeypatch, tokenizer, said):
    """Every model says these tokens from now on."""

    class Engine:
        def __init__(self, *given, **settings):
            self.stop = settings.get("stop")

        def run(self, requests, between):
            for r in requests:
                for n in range(1, len(said) + 1):
                    stop = r.stop or self.stop
                    keep = stop(said[:n]) if stop else None
                    if keep is not None or said[n - 1] in tokenizer.eos_ids or n == len(said):
                        reason = "stop" if keep is not None else "eos" if said[n - 1] in tokenizer.eos_ids else "length"
                        yield Completion(r.id, tuple(said[:n]), (0.0,) * n, reason)
                        break

    monkeypatch.setattr(rollouts, "Engine", Engine)


def say(monkeypatch, tokenizer, prompt, said, stop):
    """What a rollout makes of a model that says these tokens."""
    scripted(monkeypatch, tokenizer, said)
    config: ModelConfig = random_config(SIZES)
    (sample,) = rollout(config, {}, tokenizer, [Prompt("p", prompt)], Settings(stop=stop), jax.random.key(0))
    return sample


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        (("<|im_end|>",), " Paris", 1),
        (("<|im_end|> and",), " Paris", 2),
        (("s<|im_end|>",), " Pari", 1),
        ((" more", "<|im_end|>"), " Paris", 1),
        ((" more",), " Paris and", 3),
        (("never", "<|im_start|>"), " Paris and more", None),
    ],
)
def test_a_special_token_may_be_a_stop_string(monkeypatch, stop, text, count):
    """It ends the text where it stands; one that no stop string names is no text, as before."""
    ours = byte_tokenizer()
    paris, end, rest, more = ours.encode(" Paris"), ours.encode("<|im_end|>"), ours.encode(" and"), ours.encode(" more")
    said = [*paris, *end, *rest, *more]
    sample = say(monkeypatch, ours, tuple(ours.encode("Capital of France:")), said, stop)
    assert sample.text == text
    pieces = [paris, end, rest, more]
    assert sample.reason == ("length" if count is None else "stop")
    if count is not None:
        assert len(sample.tokens) == sum(map(len, pieces[: count + 1]))


@pytest.mark.parametrize(
    "block",
    [SampleOptions, Sampling, Evaluation, lambda stop: Requests(None).settings({"until": list(stop)})],  # pyright: ignore
    ids=["sample", "sampling.stop", "evaluation.stop", "until"],
)
@pytest.mark.parametrize(("stop", "text"), [("<|im_end|>", " Paris"), ("s<|im_end|> and", " Pari")])
def test_every_key_for_stop_strings_takes_a_special_token(monkeypatch, block, stop, text):
    ours = byte_tokenizer()
    scripted(monkeypatch, ours, ours.encode(" Paris<|im_end|> and more"))
    settings = block(stop=(stop,))
    if isinstance(settings, Evaluation):
        settings = settings.settings(dtype="float32", gather=False, stop=settings.stop)
    elif not isinstance(settings, Settings):
        settings = settings.settings(dtype="float32", gather=False)
    prompts = [Prompt("p", tuple(ours.encode("Capital of France:")))]
    config = random_config({**SIZES, "max_position_embeddings": 1024})
    sample, *_ = rollout(config, {}, ours, prompts, settings, jax.random.key(0))
    assert (sample.text, sample.reason) == (text, "stop")


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_a_completion_keeps_its_first_space_and_a_stop_string_finds_it(monkeypatch, kind):
    ours = llama_like(kind)
    prompt = ours.encode("The capital of France is", special=True)
    said = ours.join("The capital of France is", " Paris and more", special=True)[1]
    free = say(monkeypatch, ours, tuple(prompt), said, ())
    assert free.text == " Paris and more"
    stopped = say(monkeypatch, ours, tuple(prompt), said, (" Paris",))
    assert (stopped.text, stopped.reason) == ("", "stop")
    assert len(stopped.tokens) < len(said)
    # Behind a BOS alone a text begins: the space is the tokenizer's.
    assert say(monkeypatch, ours, (1,), ours.encode("Paris"), ()).text == "Paris"


def test_reading_is_what_it_was_where_no_special_token_is_named():
    ours = byte_tokenizer()
    ids = ours.encode("a<|im_end|>b ç<|im_start|> 😀")
    stops = Stops(ours, ("x",))
    assert stops.read(ids) == stops.cut(ids) == ours.decode(ids) == "ab ç 😀"


# --- lines of prompts ---


def lines_to_text(tokenizer, line, chat=None):
    model = Model(None, None, tokenizer)  # pyright: ignore  # the text side alone is read
    return list(run.to_prompt(model, line, chat, "p.jsonl:3").tokens)


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_a_prompt_has_one_bos_whether_it_brings_one_or_not(kind):
    ours = llama_like(kind)
    bare = lines_to_text(ours, {"prompt": "[INST] 1+1? [/INST]"}, False)
    assert lines_to_text(ours, {"prompt": "<s>[INST] 1+1? [/INST]"}, False).count(1) == bare.count(1) == 1
    chat = lines_to_text(ours, {"messages": [{"role": "user", "content": "1+1?"}]})
    assert (chat[0], chat.count(1)) == (1, 1)


def test_an_unfinished_turn_of_the_assistant_is_gone_on_with():
    ours = byte_tokenizer()
    asked = {"role": "user", "content": "1+1?"}
    tokens = lines_to_text(ours, {"messages": [asked, {"role": "assistant", "content": "It is"}]})
    wanted = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nIt is"
    assert ours.decode(tokens, special=True) == wanted
    # Other keys are the template's affair.
    assert lines_to_text(ours, {"messages": [{**asked, "name": "ann"}]}) == lines_to_text(ours, {"messages": [asked]})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "messages is 'Hi'; a list"),
        (None, "messages is None; a list"),
        ([], "a conversation without messages"),
        (["Hi"], r"message 0 is 'Hi'; \{role, content\} is wanted"),
        ([{"role": "user", "content": None}], "message 0: content is None; a text is wanted"),
        ([{"role": "user"}], "message 0: content is None; a text is wanted"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"message 0: content is \[\{'type'"),
        ([{"role": "you", "content": "a"}], "message 0: role is 'you'; choose one of"),
    ],
)
def test_malformed_messages_are_refused_with_their_line(messages, message):
    with pytest.raises(UserError, match=rf"^p\.jsonl:3: {message}"):
        lines_to_text(byte_tokenizer(), {"messages": messages})


def test_a_prompt_that_does_not_fit_is_named_in_a_short_line():
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    for prompt, said in ((Prompt("y" * 10**6, (1,) * 300), "300 tokens"), (Prompt("y" * 10**6, ()), "is empty")):
        with pytest.raises(UserError, match=said) as error:
            rollout(model.config, model.params, model.tokenizer, [prompt], Settings(), jax.random.key(0))
        assert len(str(error.value)) < 400


def test_any_number_of_slots_gives_the_same():
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    prompts = [Prompt("1+2", tuple(model.tokenizer.encode("1+2")))]
    few, many = (
        rollout(model.config, model.params, model.tokenizer, prompts, settings, jax.random.key(0))
        for settings in (Settings(max_new_tokens=6), Settings(max_new_tokens=6, slots=2**40))
    )
    assert few[0].tokens == many[0].tokens


def test_the_date_of_a_sample_is_a_key(tmp_path, monkeypatch):
    template = "{{ strftime_now('%Y-%m-%d') }}{{ messages[0].content }}"
    model = Model(random_config(SIZES), {}, byte_tokenizer(chat_template=template))
    asked = []

    def sampled(config, params, tokenizer, prompts, *given, **more):
        asked.extend(tokenizer.decode(p.tokens) for p in prompts)
        return [rollouts.Sample(p.id, 0, "", (), (), "eos") for p in prompts]

    monkeypatch.setattr(run, "open_model", lambda path, mesh: model)
    monkeypatch.setattr(run, "rollout", sampled)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": "y"}\n')
    for _ in range(2):
        run.sample_file("m", tmp_path / "p.jsonl", tmp_path / "o.jsonl", SampleOptions(date="2026-01-31"))
    assert asked == ["2026-01-31x", "2026-01-31y"] * 2
    assert len([json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]) == 2
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n\n{"messages": null}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:3: messages is None"):
        run.sample_file("m", tmp_path / "p.jsonl", tmp_path / "o.jsonl", SampleOptions())


# --- temperatures ---


@pytest.mark.parametrize("temperature", [1e-50, 1e-40])
def test_a_temperature_too_small_for_float32_is_greedy(temperature):
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    prompts = [Prompt(str(i), tuple(model.tokenizer.encode(text))) for i, text in enumerate(("1+2", "12*3", "7"))]
    cold = dataclasses.replace(Settings(max_new_tokens=6), temperature=temperature)
    assert cold.greedy
    found, wanted = (
        rollout(model.config, model.params, model.tokenizer, prompts, settings, jax.random.key(0))
        for settings in (cold, Settings(max_new_tokens=6))
    )
    assert [s.tokens for s in found] == [s.tokens for s in wanted]
    with pytest.raises(UserError, match=r"samples is 2 at temperature 1e-\d0: they would all be the same"):
        Settings(samples=2, temperature=temperature)
    assert not Settings(temperature=1e-6).greedy
    assert Decoding(cold.greedy).greedy
