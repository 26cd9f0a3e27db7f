// mbarriers: phase, arrivals and transaction bytes, all in the 8 bytes of the object itself, as in hardware.
#include <cstdint>
#include <string>

#include "device/simt/block.h"
#include "device/simt/core.h"

namespace deep_ep::simt {
namespace {

constexpr uint64_t kMagic = 0x2c5;  // 10 bits: tells an initialised object from the fill pattern and from garbage
constexpr int64_t kMaxBytes = (1 << 20) - 1;
constexpr uint32_t kMaxArrivals = 4095;

struct Fields {
    uint32_t phase;
    uint32_t expected;  // arrivals per phase
    uint32_t missing;   // arrivals
    int64_t bytes;      // still to come; negative when copies finish before they are announced
};

bool decode(uint64_t word, Fields& fields) {
    if (word >> 54 != kMagic) return false;
    fields.phase = word & 1;
    fields.expected = (word >> 1) & 0xfff;
    fields.missing = (word >> 13) & 0xfff;
    fields.bytes = static_cast<int64_t>((word >> 25) & 0x1fffffff) - (1 << 28);
    return true;
}

uint64_t encode(const Fields& fields) {
    return kMagic << 54 | static_cast<uint64_t>(fields.bytes + (1 << 28)) << 25 |
           static_cast<uint64_t>(fields.missing) << 13 | static_cast<uint64_t>(fields.expected) << 1 | fields.phase;
}

bool is_untouched(const Fields& fields) { return fields.missing == fields.expected && fields.bytes == 0; }

void finish_phase_if_complete(Fields& fields) {
    if (fields.missing != 0 || fields.bytes != 0) return;
    fields.phase ^= 1;
    fields.missing = fields.expected;
}

Fiber& user_of(uint64_t* state, const char* primitive) {
    Fiber& self = running_fiber(primitive);
    if (running.is_seeded) perturb();
    if (!self.block->shared().contains(state, sizeof(*state)) || reinterpret_cast<uintptr_t>(state) % 8 != 0) {
        self.block->fail(self, concat(primitive, ": ", static_cast<void*>(state),
                                      " is not an aligned mbarrier in this block's shared memory"));
    }
    return self;
}

Fields read(const Fiber& self, const uint64_t* state, const char* primitive) {
    Fields fields;
    if (!decode(*state, fields)) self.block->fail(self, concat(primitive, ": the mbarrier was never initialised"));
    return fields;
}

}  // namespace

void mbarrier_init(uint64_t* state, uint32_t arrivals) {
    Fiber& self = user_of(state, "mbarrier_init");
    if (arrivals == 0 || arrivals > kMaxArrivals) {
        self.block->fail(self, concat("mbarrier_init: ", arrivals, " arrivals; 1 to ", kMaxArrivals, " are possible"));
    }
    hb::on_mbarrier_init(state);
    *state = encode({.phase = 0, .expected = arrivals, .missing = arrivals, .bytes = 0});
    note_change();
}

void mbarrier_arrive(uint64_t* state, bool has_bytes, uint32_t bytes) {
    const char* const name = has_bytes ? "mbarrier_arrive_expect_tx" : "mbarrier_arrive";
    Fiber& self = user_of(state, name);
    Fields fields = read(self, state, name);
    if (fields.missing == 0) self.block->fail(self, concat(name, ": more arrivals than this phase expects"));
    hb::on_mbarrier_use(state);
    hb::on_mbarrier_arrive(state, fields.phase, is_untouched(fields));
    fields.bytes += bytes;
    if (fields.bytes > kMaxBytes) self.block->fail(self, concat(name, ": ", fields.bytes, " bytes are outstanding"));
    --fields.missing;
    finish_phase_if_complete(fields);
    *state = encode(fields);
    note_change();
}

bool mbarrier_try_wait(uint64_t* state, uint32_t phase_parity) {
    Fiber& self = user_of(state, "mbarrier_try_wait");
    hb::on_mbarrier_use(state);
    for (int attempt = 0; attempt < 2; ++attempt) {
        const Fields fields = read(self, state, "mbarrier_try_wait");
        note_load(state, *state);
        if (fields.phase != (phase_parity & 1)) {
            hb::on_mbarrier_wait(state, phase_parity & 1);
            return true;
        }
        if (attempt == 0) {
            if (self.wait_note == nullptr) describe_wait("mbarrier phase with parity", phase_parity & 1);
            self.block->poll(self);
        }
    }
    return false;
}

void mbarrier_complete_bytes(const Fiber& issuer, uint64_t* state, uint32_t bytes) {
    const Fields before = read(issuer, state, "bulk_load");
    Fields fields = before;
    hb::on_bulk_load_done(issuer.agent, state, fields.phase, is_untouched(before));
    fields.bytes -= bytes;
    finish_phase_if_complete(fields);
    *state = encode(fields);
}

}  // namespace deep_ep::simt
