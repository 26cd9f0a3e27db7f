#include "runtime/config.h"

#include <algorithm>

#include "core/error.h"
#include "layout/heap.h"

namespace deep_ep {

namespace {

// Metadata that a hint allows for: top-k 16, and one 4-byte scale for 128 bfloat16 elements.
constexpr uint64_t kHintTopk = 16;
constexpr uint64_t kHintBytesPerScale = 256;
constexpr uint64_t kHintLentTopk = layout::DataSplit::kTopk;
constexpr int kMaxHintRanks = 1 << 16;

void check_hint(int64_t hidden_bytes, int num_ranks) {
    EP_CHECK(hidden_bytes > 0 && hidden_bytes < int64_t{1} << 31, "hidden_bytes must be positive and below 2 GiB, got ",
             hidden_bytes);
    EP_CHECK(num_ranks > 0 && num_ranks <= kMaxHintRanks, "num_ranks must be positive and at most ", kMaxHintRanks,
             ", got ", num_ranks);
}

}  // namespace

Config::Config(int sms, int nvl_send, int nvl_recv, int rdma_send, int rdma_recv)
    : num_sms(sms),
      num_max_nvl_chunked_send_tokens(nvl_send),
      num_max_nvl_chunked_recv_tokens(nvl_recv),
      num_max_rdma_chunked_send_tokens(rdma_send),
      num_max_rdma_chunked_recv_tokens(rdma_recv) {
    EP_CHECK(sms >= 0, "num_sms must be at least 0, got ", sms);
    EP_CHECK(nvl_send > 0, "num_max_nvl_chunked_send_tokens must be positive, got ", nvl_send);
    EP_CHECK(rdma_send > 0, "num_max_rdma_chunked_send_tokens must be positive, got ", rdma_send);
    EP_CHECK(rdma_recv > 0, "num_max_rdma_chunked_recv_tokens must be positive, got ", rdma_recv);
    EP_CHECK(nvl_send < nvl_recv, "num_max_nvl_chunked_send_tokens must be less than ",
             "num_max_nvl_chunked_recv_tokens, got ", nvl_send, " and ", nvl_recv);
    num_max_rdma_chunked_recv_tokens = (rdma_recv + rdma_send - 1) / rdma_send * rdma_send;
    EP_CHECK(rdma_send * int64_t{2} <= num_max_rdma_chunked_recv_tokens,
             "num_max_rdma_chunked_send_tokens must be at most half of num_max_rdma_chunked_recv_tokens, got ",
             rdma_send, " and ", num_max_rdma_chunked_recv_tokens);
}

int Config::window() const {
    // Eight SMs saturate NVLink; what is in flight between two GPUs is far below a megabyte. The window only has to
    // cover the jitter between a sender and the copy-out of its receiver.
    const int64_t wanted = int64_t{num_max_nvl_chunked_recv_tokens} * std::max(1, num_sms / 2) / 4;
    return static_cast<int>(std::clamp<int64_t>(wanted, 32, layout::kMaxWindow));
}

int64_t Config::get_nvl_buffer_size_hint(int64_t hidden_bytes, int num_ranks) const {
    check_hint(hidden_bytes, num_ranks);
    const auto row_bytes = layout::align_up(static_cast<uint64_t>(hidden_bytes), 16);
    const auto slot = layout::SlotLayout::for_dispatch(row_bytes, kHintTopk, row_bytes / kHintBytesPerScale);
    const auto ranks = static_cast<uint64_t>(num_ranks);
    const uint64_t slots = layout::WindowLayout::bytes_for(ranks, slot.bytes, static_cast<uint64_t>(window()));
    const uint64_t metadata_bytes = kHintLentTopk * (sizeof(int64_t) + sizeof(float)) + sizeof(int);
    const uint64_t lent = layout::DataSplit::num_rows(ranks) * (row_bytes + metadata_bytes) +
                          layout::DataSplit::num_sums(ranks) * row_bytes;
    return static_cast<int64_t>(layout::DataSplit::bytes_for(slots, lent, ranks));
}

int64_t Config::get_rdma_buffer_size_hint(int64_t hidden_bytes, int num_ranks) const {
    check_hint(hidden_bytes, num_ranks);
    return 0;
}

}  // namespace deep_ep
