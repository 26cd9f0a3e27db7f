#include "bench/links.h"

#include <algorithm>

#include "bench/push_all.h"
#include "core/error.h"

namespace deep_ep::bench {

namespace {

int64_t checked(int rank, int num_ranks, int64_t bytes_per_peer) {
    EP_CHECK(num_ranks > 1 && num_ranks <= layout::kMaxRanks, "num_ranks must be in [2, ", layout::kMaxRanks, "], got ",
             num_ranks);
    EP_CHECK(rank >= 0 && rank < num_ranks, "rank must be in [0, ", num_ranks, "), got ", rank);
    EP_CHECK(bytes_per_peer > 0 && bytes_per_peer % 16 == 0, "bytes_per_peer must be a positive multiple of 16, got ",
             bytes_per_peer);
    return bytes_per_peer;
}

}  // namespace

Links::Links(std::shared_ptr<dev::Device> device, int rank, int num_ranks, int64_t bytes_per_peer,
             dev::Placement placement)
    : device_(std::move(device)),
      rank_(rank),
      num_ranks_(num_ranks),
      bytes_per_peer_(checked(rank, num_ranks, bytes_per_peer)),
      mailbox_(std::make_shared<comm::Mailbox>(rank, num_ranks)),
      heap_(device_, mailbox_, num_ranks, static_cast<size_t>(num_ranks * bytes_per_peer), placement),
      stream_(device_, device_->create_stream()) {}

std::string Links::export_handle() const { return comm::join_handles(*mailbox_, heap_); }

void Links::connect(const std::vector<std::string>& handles) { comm::connect(handles, *mailbox_, heap_); }

void Links::load(const void* source) {
    device_->copy_now(heap_.local() + rank_ * bytes_per_peer_, source, static_cast<size_t>(bytes_per_peer_));
}

void Links::push(int num_sms, dev::Stream stream) {
    EP_CHECK(heap_.is_connected(), "connect the ranks before they push");
    PushAllParams params{.bases = {}, .rank = rank_, .num_ranks = num_ranks_, .bytes_per_peer = 0};
    params.bytes_per_peer = static_cast<uint64_t>(bytes_per_peer_);
    for (int peer = 0; peer < num_ranks_; ++peer) params.bases[peer] = heap_.base(peer);
    const int num_blocks = std::clamp(num_sms, 1, device_->num_sms());
    if (stream == nullptr) stream = stream_.get();
    const dev::CurrentDevice current(*device_);
#if EP_WITH_CUDA
    if (device_->kind() == dev::DeviceKind::kCuda) return push_all_on_cuda(params, num_blocks, stream);
#endif
    push_all_on_cpu(params, num_blocks, stream);
}

void Links::synchronize() { device_->synchronize_stream(stream_.get()); }

}  // namespace deep_ep::bench
