// The tuning record that callers pass around, with the argument names they know.
#pragma once

#include <cstdint>

namespace deep_ep {

struct Config {
    int num_sms;
    int num_max_nvl_chunked_send_tokens;
    int num_max_nvl_chunked_recv_tokens;
    int num_max_rdma_chunked_send_tokens;
    int num_max_rdma_chunked_recv_tokens;

    // Throws InvalidArgument naming the argument. `num_max_rdma_chunked_recv_tokens` is rounded up to a multiple of the
    // send chunk, as callers expect.
    Config(int num_sms, int num_max_nvl_chunked_send_tokens, int num_max_nvl_chunked_recv_tokens,
           int num_max_rdma_chunked_send_tokens, int num_max_rdma_chunked_recv_tokens);

    // Bytes of `num_nvl_bytes` with which calls of this configuration run at full speed; fewer work, more slowly.
    int64_t get_nvl_buffer_size_hint(int64_t hidden_bytes, int num_ranks) const;
    // 0 where all ranks share a node.
    int64_t get_rdma_buffer_size_hint(int64_t hidden_bytes, int num_ranks) const;

    // Slots that one source gets in one bank.
    int window() const;
};

}  // namespace deep_ep
