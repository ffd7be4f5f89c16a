"""``ray.data.llm`` in place of an endpoint, without vLLM: its processor's HTTP sibling asks a real server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crem.config import SynthesiseConfig
from crem.errors import ConfigError
from pipelines.corpus.verify import verify
from pipelines.synthesis import synthesise as job
from pipelines.synthesis.batch_engine import VllmEngine, require_vllm
from pipelines.synthesis.endpoint import Completion
from pipelines.synthesis.question_prompt import Message
from pipelines.synthesis.synthesise import synthesise
from tests.pipelines.conftest import table
from tests.pipelines.synthesis.answering_server import Reply, Request, answering, completion, good
from tests.pipelines.synthesis.conftest import settings
from tests.pipelines.synthesis.test_synthesise import config
from tests.pipelines.synthesis.unasked import ASKABLE, ROWS, SKIPPED, write_unasked


@dataclass(frozen=True)
class HttpEngine:
    """``ray.data.llm``'s processor that sends each row to a server."""

    settings: SynthesiseConfig
    name: str = "ray.data.llm"

    def processor_config(self) -> Any:
        from ray.data.llm import HttpRequestProcessorConfig

        return HttpRequestProcessorConfig(
            url=f"{self.settings.base_url}/chat/completions", batch_size=8, concurrency=1, max_retries=2
        )

    def request(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {"payload": {"model": self.settings.model, "messages": list(messages)}}

    def completion(self, row: Mapping[str, Any]) -> Completion:
        answer = row["http_response"]
        choice, usage = answer["choices"][0], answer["usage"]
        return Completion(
            text=choice["message"]["content"],
            cut=choice["finish_reason"] == "length",
            refused=False,
            prompt_tokens=usage["prompt_tokens"],
            answer_tokens=usage["completion_tokens"],
        )


def test_a_request_and_an_answer_of_vllm() -> None:
    """Names are those of Ray's ``vllm_engine_stage``."""
    engine = VllmEngine(settings("model=m", "engine=vllm", "max_answer_tokens=9", "request={seed: 4}"), ("count",))
    request = engine.request([{"role": "user", "content": "Ask."}])
    schema = json.loads(request["sampling_params"].pop("structured_outputs")["json"])
    assert schema["properties"]["pairs"]["items"]["properties"]["kind"]["enum"] == ["count"]
    assert request == {
        "messages": [{"role": "user", "content": "Ask."}],
        "sampling_params": {"temperature": 0.7, "max_tokens": 9, "seed": 4},
    }
    row = {"generated_text": "{", "num_generated_tokens": 9, "num_input_tokens": 70}
    assert engine.completion(row) == Completion("{", True, False, 70, 9)
    assert not engine.completion(row | {"num_generated_tokens": 8}).cut


def test_the_processor_of_vllm_takes_the_settings() -> None:
    chosen = ("model=Qwen/x", "engine=vllm", "engines=3", "concurrency=16", "engine_kwargs={tensor_parallel_size: 2}")
    made = VllmEngine(settings(*chosen), ("count",)).processor_config()
    assert (made.model_source, made.concurrency, made.batch_size) == ("Qwen/x", 3, 16)
    assert made.engine_kwargs["tensor_parallel_size"] == 2 and made.should_continue_on_error
    assert made.prepare_multimodal_stage == {"enabled": True}


def test_what_vllm_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"synthesise\.max_cost .* endpoint"):
        settings("engine=vllm", "max_cost=1", "input_price=1")
    with pytest.raises(ConfigError, match=r"pip install 'ray\[llm\]==.*vllm serve"):
        require_vllm()


@pytest.mark.slow
@pytest.mark.ray
def test_rows_are_asked_in_batches_and_what_is_answered_is_not_asked_again(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = write_unasked(tmp_path)
    monkeypatch.setattr(job, "require_vllm", lambda: None)
    monkeypatch.setattr(job, "VllmEngine", lambda chosen, kinds: HttpEngine(chosen))

    def behave(number: int, request: Request) -> Reply:
        return Reply(body=completion("no JSON")) if number % 4 == 1 or broken else good(request)

    broken = False
    with answering(behave) as server:
        made = synthesise(prepared, str(tmp_path / "out"), config(server, "engine=vllm", "attempts=4"))
        sent = len(server.requests)
    assert (made.rows_in, made.questions, made.by_reason) == (ROWS, ASKABLE, SKIPPED)
    assert made.spent.requests == sent > ASKABLE, "invalid answers were asked for again, and counted"
    assert all(len(request.images) == 1 for request in server.requests)
    records = [record for record in table(tmp_path / "out" / "answers") if record["model"]]
    assert {(r["model"], r["endpoint"], r["prompt"]) for r in records} == {("m", "ray.data.llm", "grounded-1")}
    assert verify(str(tmp_path / "out")).faults == ()

    broken = True
    with answering(behave) as server:
        made = synthesise(
            prepared, str(tmp_path / "bad"), config(server, "engine=vllm", "attempts=2", "max_failed_share=1")
        )
        assert len(server.requests) == 2 * ASKABLE == made.spent.requests
    assert (made.questions, made.by_reason) == (0, SKIPPED | {"invalid_json": ASKABLE})
