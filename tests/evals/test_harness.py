"""lm-evaluation-harness on our decoders: prompts, texts and scores of `decode.eval`, likelihoods of LLaDA's code."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as the commands do, before lm_eval is imported

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from decode import eval as evaluation
from decode import lm_eval as command
from dllm_jax import cli
from dllm_jax.checkpoints.load import load_model, resolve
from dllm_jax.config import Config
from dllm_jax.data import tasks, text
from dllm_jax.data.prompts import Prompt
from dllm_jax.decoding.generate import Decoder
from dllm_jax.errors import UsageError
from dllm_jax.evals import likelihood, public
from dllm_jax.evals.harness.model import DiffusionLM, gen_length, scaled_steps
from dllm_jax.evals.harness.task import PublicTask
from dllm_jax.mesh import make_mesh
from dllm_jax.settings import DecodeSettings, EvalSettings, TokenizerSettings
from tests.evals.test_public import LINES
from tests.traces import GOLDENS, cases

DECODE = {"policy": "threshold", "gen_length": 32, "batch_size": 4}
CONFIG = Config(decode=DecodeSettings(**DECODE))
FLAGS = [*(f"--config.decode.{name}={value}" for name, value in DECODE.items()), "--config.mesh.data=1"]


def run(*flags):
    return command.main(["lm_eval", "--config=vanilla", *flags])


def evaluate(*flags):
    return cli.execute(evaluation.main, ["eval", *flags], description="", default_config="vanilla")


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def outcome(folder):
    """The metrics of the one task in a folder of results, and its samples in order."""
    (results,), (samples,) = (list(folder.rglob(f"{kind}_*")) for kind in ("results", "samples"))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    metrics = next(iter(json.loads(results.read_text())["results"].values()))
    return metrics, sorted(rows, key=lambda row: row["doc_id"])


@pytest.fixture(scope="module")
def model():
    return load_model("llada-tiny", dtype="float32", mesh=make_mesh(data=1))


@pytest.fixture(scope="module")
def codec():
    return text.load(resolve("llada-tiny"), TokenizerSettings())


def harness(model, codec, config=CONFIG, *, chat=False):
    return DiffusionLM(model, config, codec=codec, end_ids=model.config.end_ids, companions={}, chat=chat)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def test_a_task_of_ones_own_has_the_accuracy_of_decode_eval_as_a_chat(tmp_path):
    samples = [each for each in tasks.read(tasks.HELD_OUT_SMALL) if each["task"] in ("sort", "copy")][:3]
    lines = write(tmp_path / "lines.jsonl", [*samples, samples[1] | {"id": "wrong", "answer": "tea."}])
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {lines}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['<|im_end|>'], do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    results, output = tmp_path / "results", tmp_path / "out.jsonl"
    flags = ["--tasks", "words", "--include_path", str(folder), "--apply_chat_template", "--log_samples"]
    assert run(*FLAGS, *flags, "--output_path", str(results)) == 0
    assert evaluate(*FLAGS, f"--config.input.path={lines}", f"--config.output.path={output}") == 0
    metrics, logged = outcome(results)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["resps"][0][0] for row in logged] == [row["text"] for row in rows]
    assert [row["exact_match"] == 1 for row in logged] == [row["correct"] for row in rows] == [True, True, True, False]
    assert metrics["exact_match,none"] == 0.75
    told = json.loads(next(results.rglob("results_*")).read_text())["config"]
    assert told["nfe_sum"] == sum(row["nfe"] for row in rows)
    assert told["num_tokens"] == sum(row["num_tokens"] for row in rows)


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gsm8k_from_its_own_file_is_asked_and_scored_as_by_decode_eval(tmp_path, chat):
    lines = [
        {"question": "Sort the list: oak, fern, duck.", "answer": "#### 5"},
        {"question": "Tom has 3 keys. Tom buys 2 more. How many keys does Tom have now?", "answer": "#### 5"},
        {"question": "2", "answer": "#### 2"},
    ]
    path = write(tmp_path / "gsm8k.jsonl", lines)
    given = [*FLAGS, f"--config.input.path={path}", "--config.eval.shots=0"]
    name, flags = ("gsm8k_local_chat", ["--apply_chat_template"]) if chat else ("gsm8k_local", [])
    results, output = tmp_path / "results", tmp_path / "out.jsonl"
    assert run(*given, f"--tasks={name}", *flags, f"--output_path={results}", "--log_samples") == 0
    template = f"--config.tokenizer.chat_template={'on' if chat else 'off'}"
    assert evaluate(*given, template, f"--config.output.path={output}") == 0
    metrics, logged = outcome(results)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["resps"][0][0] for row in logged] == [row["text"] for row in rows]
    assert [row["accuracy"] == 1 for row in logged] == [row["correct"] for row in rows]
    assert [row["accuracy_strict"] == 1 for row in logged] == [row["correct_strict"] for row in rows]
    assert metrics["accuracy,none"] == sum(row["correct"] for row in rows) / 3


@pytest.mark.parametrize("task", public.TASKS)
@pytest.mark.parametrize("chat", [False, True])
def test_contexts_have_the_tokens_of_decode_eval(tmp_path, model, codec, task, chat):
    name = f"{task}_local{'_chat' if chat else ''}"
    path = write(tmp_path / "lines.jsonl", [LINES[task]])
    manager, names = command.find(
        [name],
        "",
        dataclasses.replace(
            CONFIG, input=dataclasses.replace(CONFIG.input, path=str(path)), eval=EvalSettings(run_code=True)
        ),
    )
    built = manager.load(names)["tasks"][name]
    assert isinstance(built, PublicTask)
    (doc,) = built.test_docs()
    lm = harness(model, codec, chat=chat)
    context = built.fewshot_context(
        doc,
        built.config.num_fewshot,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
        chat_template=lm.apply_chat_template if chat else None,
    )
    prompt = Prompt(index=0, line=1, id=0, text=LINES[task].get("question") or "x", doc=LINES[task])
    prompt = public.asked(prompt, task=task, chat=chat, shots=-1)
    plain = text.TextCodec(codec.tokenizer, "on" if chat else "off", "text")
    got = codec.encode_chat(context) if chat else codec.encode_answer(context)
    assert got == plain.encode(prompt)
    assert built.config.generation_kwargs["until"] == list(prompt.stop)
    begin = codec.tokenizer.convert_tokens_to_ids("<|startoftext|>")
    assert got.count(begin) == int(chat)  # the template's own
    right = {
        "gsm8k": "#### 7",
        "math500": r"\boxed{1.5}",
        "humaneval": "    return 2 * x",
        "mbpp": LINES["mbpp"]["code"],
    }
    assert built.process_results(doc, [right[task]])["accuracy"] == 1.0
    assert built.process_results(doc, ["no"])["accuracy"] == 0.0


def test_a_last_message_of_the_assistant_is_continued(model, codec):
    lm = harness(model, codec, chat=True)
    turns = [{"role": "user", "content": "Sort."}, {"role": "assistant", "content": "duck, <|eot_id|>"}]
    context = lm.apply_chat_template(turns, add_generation_prompt=False)
    tokens = codec.encode_chat(context)
    assert tokens == codec.encode(Prompt(index=0, line=1, id=0, messages=tuple(turns)))
    end = codec.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert tokens.count(end) == 1  # of the first turn: what a message spells is text
    with pytest.raises(UsageError, match="expected a last message of the assistant"):
        lm.apply_chat_template(turns[:1], add_generation_prompt=False)


def test_budgets_are_rounded_up_to_blocks_and_cut(model, codec):
    lm = harness(
        model, codec, dataclasses.replace(CONFIG, decode=DecodeSettings(**DECODE | {"block_length": 16})), chat=True
    )
    context = lm.apply_chat_template([{"role": "user", "content": "Copy the list: tea, red, oak, fern."}])
    whole, short, stopped, one = lm.generate_until(
        requests(
            "generate_until",
            (context, {"until": []}),
            (context, {"until": ["nothing"], "max_gen_toks": 3, "do_sample": False}),
            (context, {"until": ", red"}),
            (context, {"until": ["<|eot_id|>"], "max_gen_toks": 32}),
        )
    )
    assert whole == one == "tea, red, oak, fern."
    assert whole.startswith(short)
    assert codec.encode_answer(short) == codec.encode_answer(whole)[:3]
    assert stopped == "tea"
    assert lm.decoder.cache_info().currsize == 2  # of 16 and of 32 tokens


def test_lengths_and_steps_for_budgets():
    decode = DecodeSettings(gen_length=96, block_length=32, steps=48)
    assert [gen_length(decode, budget) for budget in (1, 32, 33, 96, 256)] == [32, 32, 64, 96, 256]
    assert [scaled_steps(decode, length) for length in (32, 64, 96, 256)] == [16, 32, 48, 128]
    whole = DecodeSettings(gen_length=96, block_length=0, steps=48)
    assert gen_length(whole, 50) == 50
    assert [scaled_steps(whole, length) for length in (50, 96, 97)] == [25, 48, 49]
    uneven = DecodeSettings(gen_length=50, block_length=100)
    assert (gen_length(uneven, 50), gen_length(uneven, 51)) == (50, 100)


class Numbers:
    """A tokenizer whose text is token ids."""

    def encode_answer(self, answer):
        return [int(token) for token in answer.split()]


def spelled(tokens):
    return " ".join(map(str, tokens))


@pytest.mark.parametrize("case", cases("F_loglikelihood"), ids=lambda case: case.name)
def test_likelihoods_of_the_reference(case, monkeypatch):
    recorded, args = case.arrays, case.args
    draws = iter(zip(recorded["perturbed"].astype(np.int32), recorded["p_mask"], strict=True))
    monkeypatch.setattr(likelihood, "perturb", lambda *args, **kwargs: next(draws))
    config = Config(
        decode=DecodeSettings(cfg_scale=args["cfg_scale"]),
        eval=EvalSettings(mc_num=args["mc_num"], mc_batch_size=args["batch_size"]),
    )
    model = load_model(case.checkpoint, dtype="float32", mesh=make_mesh(data=1))
    lm = harness(model, Numbers(), config)
    pair = spelled(recorded["prompt"]) + " ", spelled(recorded["answer"])
    ((value, is_greedy),) = lm.loglikelihood(requests("loglikelihood", pair))
    assert value == pytest.approx(float(recorded["log_likelihood"]), rel=1e-4)
    assert is_greedy is False


def test_greedy_continuations_and_rolling_likelihoods():
    model = load_model(GOLDENS / "checkpoints" / "llada-tiny", dtype="float32", mesh=make_mesh(data=1))
    config = Config(eval=EvalSettings(mc_num=4, mc_batch_size=4, is_greedy=True))
    lm = harness(model, Numbers(), config)
    decode = DecodeSettings(gen_length=6, block_length=0, batch_size=1)
    answer = Decoder(model, Config(decode=decode))([[5, 6, 7]]).tokens_BG[0].tolist()
    other = [*answer[:-1], (answer[-1] + 1) % 60]
    pairs = requests("loglikelihood", ("5 6 7", " " + spelled(answer)), ("5 6 7", " " + spelled(other)))
    (first, greedy), (_, not_greedy) = lm.loglikelihood(pairs)
    assert (greedy, not_greedy) == (True, False)
    assert first == likelihood.log_likelihood(model, [5, 6, 7], answer, mc_num=4, batch_size=4, cfg_scale=0.0, seed=0)
    (rolling,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("5 6 7",)))
    assert rolling == likelihood.log_likelihood(model, [], [5, 6, 7], mc_num=4, batch_size=4, cfg_scale=0.0, seed=0)


def test_a_context_that_is_too_long_loses_its_beginning(model, codec, capsys):
    lm = harness(model, codec)
    longest = model.config.max_length
    words = "tea, " * longest
    prompt, answer = lm._pair(words, "oak")
    assert len(prompt) + len(answer) == longest
    assert prompt == codec.encode_answer(words.rstrip())[-len(prompt) :]
    assert len(lm._prompt(words, lm.decoder(32))) == longest - 32
    assert capsys.readouterr().err.count("tokens is cut to its last") == 1


def test_white_space_between_context_and_continuation_belongs_to_the_latter(model, codec):
    lm = harness(model, codec)
    assert lm._pair("tea, ", "oak") == lm._pair("tea,", " oak")
    assert lm._pair("tea,", " oak") == (codec.encode_answer("tea,"), codec.encode_answer(" oak"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--tasks: expected the names of tasks, got none"),
        (["--tasks=gsm8k_local", "--log_samples"], "--log_samples: expected --output_path with it, got none"),
        (["--tasks=mbpp_local"], "eval.run_code: expected true, as mbpp runs the code"),
        (["--tasks=gsm8k_local", "--include_path=nowhere"], "--include_path: expected a folder, got 'nowhere'"),
        (["--tasks=gsm8k_local,math500_local", "--config.input.path=x"], "input.path: expected one task of a "),
        (["--tasks=gsm8k_local", "--config.input.path=x"], "input.path: expected the file of gsm8k_local, got "),
        (["--tasks=gsm8k_local", "--limit=many"], "argument --limit: invalid float value: 'many'"),
        (["--tasks=gsm8k_local", "--limits=3"], "--limits: unknown flag"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(capsys, flags, message):
    assert run(*flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"error: {message}")


def test_a_chat_needs_a_template(model, codec):
    off = text.TextCodec(codec.tokenizer, "off", "text")
    with pytest.raises(UsageError, match="--apply_chat_template: expected a tokenizer with a chat template"):
        harness(model, off, chat=True)


def test_every_shipped_task_names_itself():
    files = sorted(command.TASKS.glob("*.yaml"))
    assert {file.stem for file in files} == {f"{task}_local{style}" for task in public.TASKS for style in ("", "_chat")}
    for file in files:
        lines = Path(file).read_text().splitlines()
        assert f"task: {file.stem}" in lines
        assert f"  chat: {str(file.stem.endswith('_chat')).lower()}" in lines
        assert f"  task: {file.stem.partition('_')[0]}" in lines
