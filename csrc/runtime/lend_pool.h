// A region of fixed size: who holds which bytes of it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

namespace deep_ep::runtime {

// Offsets into a region of fixed size. Large pieces are taken from the bottom and small ones, which often live longer,
// from the top, so that they do not cut up the room between. Not thread-safe.
class LendPool {
public:
    static constexpr uint64_t kAlignment = 512;  // as torch aligns its tensors
    static constexpr uint64_t kSmallBytes = 1 << 20;

    explicit LendPool(uint64_t num_bytes);

    // Where `num_bytes` (> 0) are free, or nothing: then the caller takes other memory.
    std::optional<uint64_t> take(uint64_t num_bytes);
    // Keeps the first `num_bytes` (> 0) of a piece.
    void shrink(uint64_t offset, uint64_t num_bytes);
    void give_back(uint64_t offset);

    uint64_t num_bytes() const { return num_bytes_; }
    uint64_t size_of(uint64_t offset) const;  // of a piece that is taken

private:
    using Gaps = std::map<uint64_t, uint64_t>;  // offset -> bytes; no two of them touch

    uint64_t cut(Gaps::iterator gap, uint64_t num_bytes, bool from_top);
    void free(uint64_t offset, uint64_t num_bytes);
    std::map<uint64_t, uint64_t>::iterator piece_at(uint64_t offset);

    const uint64_t num_bytes_;
    Gaps gaps_;
    std::map<uint64_t, uint64_t> taken_;  // offset -> bytes
};

}  // namespace deep_ep::runtime
