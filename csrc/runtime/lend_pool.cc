#include "runtime/lend_pool.h"

#include "core/error.h"
#include "layout/heap.h"

namespace deep_ep::runtime {

LendPool::LendPool(uint64_t num_bytes) : num_bytes_(num_bytes) {
    if (num_bytes > 0) gaps_[0] = num_bytes;
}

uint64_t LendPool::cut(Gaps::iterator gap, uint64_t num_bytes, bool from_top) {
    const auto [begin, size] = *gap;
    gaps_.erase(gap);
    const uint64_t rest = size - num_bytes;
    if (rest > 0) gaps_[from_top ? begin : begin + num_bytes] = rest;
    return from_top ? begin + rest : begin;
}

// First fit from either end.
std::optional<uint64_t> LendPool::take(uint64_t num_bytes) {
    EP_ENSURE(num_bytes > 0, "num_bytes must be positive, got 0");
    const uint64_t size = layout::align_up(num_bytes, kAlignment);
    const bool from_top = size <= kSmallBytes;
    auto found = gaps_.end();
    for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
        if (gap->second < size) continue;
        found = gap;
        if (!from_top) break;
    }
    if (found == gaps_.end()) return std::nullopt;
    const uint64_t offset = cut(found, size, from_top);
    taken_[offset] = size;
    return offset;
}

std::map<uint64_t, uint64_t>::iterator LendPool::piece_at(uint64_t offset) {
    const auto piece = taken_.find(offset);
    EP_ENSURE(piece != taken_.end(), "nothing was taken at offset ", offset);
    return piece;
}

void LendPool::shrink(uint64_t offset, uint64_t num_bytes) {
    const auto piece = piece_at(offset);
    const uint64_t kept = layout::align_up(num_bytes, kAlignment);
    EP_ENSURE(num_bytes > 0 && kept <= piece->second, "a piece of ", piece->second, " bytes cannot shrink to ",
              num_bytes);
    const uint64_t rest = piece->second - kept;
    piece->second = kept;
    if (rest > 0) free(offset + kept, rest);
}

void LendPool::give_back(uint64_t offset) {
    const auto piece = piece_at(offset);
    const uint64_t size = piece->second;
    taken_.erase(piece);
    free(offset, size);
}

void LendPool::free(uint64_t offset, uint64_t num_bytes) {
    auto gap = gaps_.emplace(offset, num_bytes).first;
    if (const auto next = std::next(gap); next != gaps_.end() && gap->first + gap->second == next->first) {
        gap->second += next->second;
        gaps_.erase(next);
    }
    if (gap == gaps_.begin()) return;
    const auto before = std::prev(gap);
    if (before->first + before->second != gap->first) return;
    before->second += gap->second;
    gaps_.erase(gap);
}

uint64_t LendPool::size_of(uint64_t offset) const { return taken_.at(offset); }

}  // namespace deep_ep::runtime
