// What travels on a connection of the engine `host`: a header, and behind that of a put its bytes.
#pragma once

#include <cstdint>

namespace deep_ep::rail::host {

enum class MessageKind : uint32_t {
    kPut = 1,  // also without bytes
    kAdd = 2,
    kFarewell = 3,  // nothing comes after it
};

struct Header {
    MessageKind kind;
    uint32_t num_bytes;
    uint64_t dst;
    uint64_t flag;  // or the counter
    uint64_t value;
};
static_assert(sizeof(Header) == 32);

}  // namespace deep_ep::rail::host
