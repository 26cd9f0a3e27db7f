"""The library as vLLM, SGLang, Megatron-LM, xtuner, TensorRT-LLM, rtp-llm and lmdeploy call it: by which names, in
which order, with which dtypes, and what they do with what comes back."""

from typing import Any

import client_cases as clients
import pytest
from utils import Pool

CLIENTS = [clients.vllm, clients.sglang, clients.megatron, clients.xtuner, clients.tensorrt_llm, clients.rtp_llm,
           clients.lmdeploy]  # yapf: disable


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_client(pool: Pool, client: Any, num_ranks: int) -> None:
    pool.run(client, num_ranks)
