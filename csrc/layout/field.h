// A region of bytes, declared as a list of fields. Offsets are 64-bit and exist nowhere else.
#pragma once

#include <cstdint>

namespace deep_ep::layout {

constexpr uint64_t align_up(uint64_t value, uint64_t alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

// `count` elements of `element_bytes` each, `offset` bytes from the start of the region.
struct Field {
    uint64_t offset = 0;
    uint64_t element_bytes = 0;
    uint64_t count = 0;

    constexpr uint64_t bytes() const { return element_bytes * count; }
    constexpr uint64_t end() const { return offset + bytes(); }
    constexpr uint64_t at(uint64_t index) const { return offset + index * element_bytes; }
};

// Hands out fields one after the other.
class FieldCursor {
public:
    constexpr Field take(uint64_t element_bytes, uint64_t count, uint64_t alignment) {
        Field field{align_up(next_, alignment), element_bytes, count};
        next_ = field.end();
        return field;
    }
    constexpr uint64_t total(uint64_t alignment) const { return align_up(next_, alignment); }

private:
    uint64_t next_ = 0;
};

}  // namespace deep_ep::layout
