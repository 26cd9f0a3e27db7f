// Warp collectives: lanes of a mask meet, the last one computes everybody's result.
#include "device/simt/block.h"
#include "device/simt/core.h"

namespace deep_ep::simt {

const char* name_of(WarpOp op) {
    switch (op) {
        case WarpOp::kSync: return "__syncwarp";
        case WarpOp::kBallot: return "__ballot_sync";
        case WarpOp::kAny: return "__any_sync";
        case WarpOp::kAll: return "__all_sync";
        case WarpOp::kShuffle: return "__shfl_sync";
        case WarpOp::kShuffleXor: return "__shfl_xor_sync";
        case WarpOp::kShuffleUp: return "__shfl_up_sync";
        case WarpOp::kShuffleDown: return "__shfl_down_sync";
    }
    return "?";
}

void Block::fail_exchange(const Fiber& self, const std::string& what) const {
    fail(self, concat(name_of(self.op), "(", hex(self.mask), ") at ", self.file, ":", self.line, ": ", what));
}

// The group of lanes that `self` belongs to now, checked.
Rendezvous& Block::join(Warp& warp, Fiber& self) {
    const uint32_t mask = self.mask;
    if (((mask >> self.lane()) & 1u) == 0) fail_exchange(self, "the calling lane is not in the mask");
    if ((mask & warp.exited) != 0) fail_exchange(self, concat("lanes ", hex(mask & warp.exited), " have returned"));
    for (int i = 0; i < warp.num_open; ++i) {
        Rendezvous& group = warp.open[i];
        if ((group.mask & mask) == 0) continue;
        const bool is_same_line = group.line == self.line && group.file == self.file;
        if (group.mask == mask && group.op == self.op && (is_same_line || !drive_.check_call_sites)) return group;
        fail_exchange(self, concat(group.mask == mask ? "mismatched warp collective" : "overlapping masks", ": lanes ",
                                   hex(group.arrived), " wait in ", name_of(group.op), "(", hex(group.mask), ") at ",
                                   group.file, ":", group.line));
    }
    Rendezvous& group = warp.open[warp.num_open++];
    // Only __syncwarp orders memory; shuffles and votes do not.
    group =
        Rendezvous{mask, 0, self.op, self.line, self.file, self.op == WarpOp::kSync ? hb::make_key() : 0, self.lane()};
    return group;
}

uint64_t Block::exchange(Fiber& self) {
    Warp& warp = warps_[static_cast<size_t>(self.warp())];
    const uint32_t lane_bit = 1u << self.lane();
    Rendezvous* group = &warp.open[0];
    const bool is_usual = warp.num_open == 1 && group->mask == self.mask && group->op == self.op &&
                          group->line == self.line && group->file == self.file && (self.mask & lane_bit) != 0;
    if (!is_usual) group = &join(warp, self);
    if (self.mask == ~0u) {
        const Fiber& first = fibers_[static_cast<size_t>(self.warp() * 32 + group->first)];
        check_same(self, first, self.warp_calls, first.warp_calls, "warp");
    }
    group->arrived |= lane_bit;
    const hb::Key meeting = group->meeting;
    if (meeting != 0) hb::release(meeting);
    if (group->arrived != group->mask) {
        self.state = FiberState::kCollective;
        self.meeting = meeting;
        hb::add_reference(meeting);
        suspend(self);
        if (meeting != 0) leave_meeting(self);
    } else {
        complete(warp, *group, self);
        hb::acquire(meeting);
        hb::drop(meeting);
    }
    return self.exchange;
}

void Block::complete(Warp& warp, Rendezvous& group, Fiber& last) {
    const uint32_t mask = group.mask;
    const WarpOp op = group.op;
    group = warp.open[--warp.num_open];
    Fiber* const lanes = &fibers_[static_cast<size_t>(last.warp()) * 32];
    if (op == WarpOp::kBallot || op == WarpOp::kAny || op == WarpOp::kAll) {
        uint64_t ballot = 0;
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
            const int lane = __builtin_ctz(rest);
            ballot |= (lanes[lane].exchange & 1u) << lane;
        }
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) lanes[__builtin_ctz(rest)].exchange = ballot;
    } else if (op != WarpOp::kSync) {
        uint64_t given[32];
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
            const int lane = __builtin_ctz(rest);
            given[lane] = lanes[lane].exchange;
        }
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
            Fiber& fiber = lanes[__builtin_ctz(rest)];
            if (((mask >> fiber.source_lane) & 1u) == 0) {
                fail_exchange(fiber,
                              concat("reads lane ", static_cast<int>(fiber.source_lane), ", which is not in the mask"));
            }
            fiber.exchange = given[fiber.source_lane];
        }
    }
    for (uint32_t rest = mask & ~(1u << last.lane()); rest != 0;) {
        const int lane = 31 - __builtin_clz(rest);
        make_ready_next(lanes[lane]);
        rest ^= 1u << lane;
    }
}

uint64_t warp_exchange(WarpOp op, uint32_t mask, uint64_t value, unsigned source_lane, const char* file, int line) {
    Fiber& self = running_fiber("a warp collective");
    if (running.is_seeded) perturb();
    self.op = op;
    self.mask = mask;
    self.exchange = value;
    self.source_lane = static_cast<uint8_t>(source_lane);
    self.file = file;
    self.line = line;
    const uint64_t result = self.block->exchange(self);
    // Not progress by itself: a warp may poll with collectives. What it does next depends on the result, as on a load.
    self.poll.hash = (self.poll.hash ^ static_cast<uint64_t>(line)) * 0x9e3779b97f4a7c15ull + result;
    return result;
}

}  // namespace deep_ep::simt
