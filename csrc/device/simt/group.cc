// Groups of threads (algo/group.h): whoever stays away from a call that the whole group makes is found where the threads
// meet next, in a collective or a barrier of the group, or where they end. Nobody waits here: a check that did would order
// what the kernel must order itself.
#include "device/simt/block.h"
#include "device/simt/core.h"

namespace deep_ep::simt {

void GroupCalls::add(const char* what) {
    // By its letters: a name may have several addresses.
    for (const char* letter = what; *letter != '\0'; ++letter)
        hash = (hash ^ static_cast<unsigned char>(*letter)) * 0x01000193u;
    hash = hash * 0x01000193u + 1;
    ++num_calls;
    last = what;
}

namespace {

// Compilers differ in whether a template's name has its arguments.
std::string name_without_arguments(const std::string& name) { return name.substr(0, name.find('<')); }

std::string describe(const GroupCalls& calls) {
    if (calls.num_calls == 0) return "none";
    return concat(calls.num_calls, ", the last of them ", name_without_arguments(calls.last));
}

}  // namespace

std::string describe_difference(const Fiber& other, const GroupCalls& mine, const GroupCalls& others,
                                const char* group) {
    return concat("the threads of a ", group, " do not make the same calls: this one has made ", describe(mine),
                  "; warp ", other.warp(), " lane ", other.lane(), " has made ", describe(others));
}

void Block::fail_group(const Fiber& self, const char* what, const std::string& why) const {
    fail(self, concat(name_without_arguments(what), *what == '\0' ? "" : ": ", why));
}

void Block::expect_warp(Fiber& self, const char* what) { self.warp_calls.add(what); }

void Block::expect_block(Fiber& self, const char* what) { self.block_calls.add(what); }

// Against the first that has ended: a thread that ends differs from no one who does.
void Block::check_groups_at_exit(const Fiber& self) const {
    const Fiber* const lanes = &fibers_[static_cast<size_t>(self.warp()) * 32];
    if (const uint32_t exited = warps_[static_cast<size_t>(self.warp())].exited; exited != 0) {
        const Fiber& other = lanes[__builtin_ctz(exited)];
        check_same(self, other, self.warp_calls, other.warp_calls, "warp");
    }
    if (first_exited_ != nullptr)
        check_same(self, *first_exited_, self.block_calls, first_exited_->block_calls, "block");
}

void expect_warp(const char* what) {
    Fiber& self = running_fiber("a group of threads");
    self.block->expect_warp(self, what);
}

void expect_block(const char* what) {
    Fiber& self = running_fiber("a group of threads");
    self.block->expect_block(self, what);
}

}  // namespace deep_ep::simt
