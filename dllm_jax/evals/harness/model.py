"""A diffusion language model as lm-evaluation-harness sees one, decoded with any configuration of ours."""

import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import rich.progress
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from dllm_jax.config import Config
from dllm_jax.data.stop_strings import cut
from dllm_jax.data.text import TextCodec
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.errors import UsageError
from dllm_jax.evals.likelihood import log_likelihood
from dllm_jax.models.model import Model
from dllm_jax.progress import for_people
from dllm_jax.settings import DecodeSettings

BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names of the most tokens that a request allows
FOLLOWED = (*BUDGETS, "until")


class DiffusionLM(LM):
    """Generates and weighs texts for lm-evaluation-harness.

    How a text is decoded is a matter of the configuration. A request decides where it stops and, with a budget, how
    long it may get: then as many tokens are generated as fill the blocks that hold the budget, and the rest is cut off.

    Args:
        model: a diffusion model.
        config: all settings.
        codec: its tokenizer.
        end_ids: the tokens that end a text.
        companions: networks of the policy, by name.
        chat: contexts come from `apply_chat_template`; the special tokens in them are tokens.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        *,
        codec: TextCodec,
        end_ids: tuple[int, ...],
        companions: Mapping[str, Any],
        chat: bool,
    ) -> None:
        super().__init__()
        if chat and (codec.tokenizer.chat_template is None or codec.chat_template == "off"):
            raise UsageError(
                "--apply_chat_template: expected a tokenizer with a chat template, and tokenizer.chat_template not off"
            )
        self.model, self.config, self.codec, self.end_ids = model, config, codec, end_ids
        self.companions, self.chat = companions, chat
        self.decoder = functools.cache(self._decoder)  # by tokens to generate
        self.num_tokens = self.forwards = self.texts = 0
        self._told: set[str] = set()

    @property
    def tokenizer_name(self) -> str:
        """Part of the names of cached requests."""
        return str(self.codec.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template itself, to be logged."""
        template = self.codec.tokenizer.chat_template
        return template if chat_template and isinstance(template, str) else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as a context. A last message of the assistant is continued, as an answer that has begun."""
        if not add_generation_prompt and chat_history[-1]["role"] != "assistant":
            raise UsageError("chat: expected a last message of the assistant without a generation prompt, got another")
        return self.codec.render(chat_history)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-evaluation-harness keeps with the results: settings and cost."""
        per_forward = self.num_tokens / self.forwards if self.forwards else None
        return {
            "dllm_jax": dataclasses.asdict(self.config),
            "num_tokens": self.num_tokens,
            "nfe_sum": self.forwards,
            "nfe_mean": self.forwards / self.texts if self.texts else None,
            "tokens_per_forward": per_forward,
        }

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text of every request, a context and its settings, up to its stop strings."""
        by_budget = defaultdict(list)
        for place, request in enumerate(requests):
            by_budget[self._budget(request.args[1])].append(place)
        texts: dict[int, str] = {}
        with rich.progress.Progress(**for_people()) as progress:
            bar = progress.add_task("decoding", total=len(requests))
            for budget, places in by_budget.items():
                decoder = self.decoder(gen_length(self.config.decode, budget))
                prompts = [self._prompt(requests[place].args[0], decoder) for place in places]
                for batch, result in decoder.stream(prompts, rows=places):
                    for row, index in enumerate(batch):
                        place = places[index]
                        texts[place] = self._text(result, row, budget=budget, settings=requests[place].args[1])
                        self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
                    progress.advance(bar, len(batch))
        return [texts[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Estimates log p(continuation | context) in nats, and says whether it is the greedy one (eval.is_greedy)."""
        answers = []
        for request in rich.progress.track(requests, "weighing", **for_people()):
            prompt, answer = self._pair(*request.args)
            answers.append((self._weight(prompt, answer), self.config.eval.is_greedy and self._greedy(prompt, answer)))
            self.cache_hook.add_partial("loglikelihood", request.args, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Estimates log p of whole texts, in stretches that the model takes, each by itself."""
        answers = []
        for request in rich.progress.track(requests, "weighing", **for_people()):
            tokens, longest = self.codec.encode_answer(request.args[0]), self.model.config.max_length
            stretches = [tokens[at : at + longest] for at in range(0, len(tokens), longest)]
            answers.append(sum(self._weight([], stretch) for stretch in stretches))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def _decoder(self, length: int) -> Decoder:
        decode = self.config.decode
        steps = decode.steps and scaled_steps(decode, length)
        config = dataclasses.replace(self.config, decode=dataclasses.replace(decode, gen_length=length, steps=steps))
        return Decoder(self.model, config, end_ids=self.end_ids, **self.companions)

    def _budget(self, settings: Mapping[str, Any]) -> int:
        """The most tokens of a text, and a word on settings that have no part in it."""
        for name, value in settings.items():
            if name not in FOLLOWED and value and not (name == "do_sample" and not settings.get("temperature", 1)):
                self._tell(f"generation setting {name}={value} is not followed: decode.* decides")
        given = [settings[name] for name in BUDGETS if settings.get(name)]
        return int(given[0]) if given else self.config.decode.gen_length

    def _prompt(self, context: str, decoder: Decoder) -> list[int]:
        """Tokens of a context, without its beginning if it is too long."""
        tokens = self.codec.encode_chat(context) if self.chat else self.codec.encode_answer(context)
        tokens = self._shortened(tokens, decoder.longest_prompt)
        decoder.check(tokens)
        return tokens

    def _shortened(self, tokens: list[int], longest: int) -> list[int]:
        """The end of a context that is too long; where there is no room for any, all of it, to be refused."""
        if not 0 < longest < len(tokens):
            return tokens
        self._tell(f"a context of {len(tokens)} tokens is cut to its last {longest} (others may be, too)")
        return tokens[-longest:]

    def _text(self, result: DecodeResult, row: int, *, budget: int, settings: Mapping[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        text, num_tokens, _ = cut(self.codec, result.text_ids(row)[:budget], [stop for stop in stops if stop])
        self.num_tokens, self.forwards = self.num_tokens + num_tokens, self.forwards + int(result.nfe_B[row])
        self.texts += 1
        return text

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, as they are together; white space between them belongs to the continuation."""
        encode = self.codec.encode_chat if self.chat else self.codec.encode_answer
        stripped = context.rstrip()
        begun = encode(stripped)
        answer = encode(context + continuation)[len(begun) :]
        longest = self.model.config.max_length - len(answer)
        return self._shortened(begun, longest), answer

    def _weight(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        settings = self.config.eval
        return log_likelihood(
            self.model,
            prompt,
            answer,
            mc_num=settings.mc_num,
            batch_size=settings.mc_batch_size,
            cfg_scale=self.config.decode.cfg_scale,
            seed=self.config.decode.seed,
        )

    def _greedy(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether the surest token first, one by one, gives the answer (LLaDA's `suffix_greedy_prediction`).

        Nothing can be decoded behind an empty context: False.
        """
        if not prompt:
            return False
        decode = DecodeSettings(
            gen_length=len(answer),
            block_length=0,
            batch_size=1,
            cfg_scale=self.config.decode.cfg_scale,
            bucket_waste=self.config.decode.bucket_waste,
        )
        decoder = Decoder(self.model, dataclasses.replace(self.config, decode=decode), end_ids=self.end_ids)
        result = decoder([list(prompt)])
        return result.tokens_BG[0].tolist() == list(answer)

    def _tell(self, line: str) -> None:
        """Says something on stderr, once for all requests that it is true of."""
        kind = line.split("=")[0].split(" of ")[0]
        if kind not in self._told:
            self._told.add(kind)
            print(line, file=sys.stderr)


def gen_length(decode: DecodeSettings, budget: int) -> int:
    """Tokens to generate for a budget: whole blocks of decode.block_length."""
    block = decode.block_length or 1
    return budget if budget == decode.gen_length else -(-budget // block) * block


def scaled_steps(decode: DecodeSettings, length: int) -> int:
    """decode.steps for another length: as many tokens per step, and as many steps in every block."""
    blocks = -(-length // decode.block_length) if decode.block_length else 1
    return -(-decode.steps * length // (decode.gen_length * blocks)) * blocks
