#include "rail/nvshmem/world.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <utility>

#include "core/error.h"
#include "rail/nvshmem/versions.h"

namespace deep_ep::rail::nvshmem {
namespace {

constexpr char kMagic[8] = {'n', 'v', 's', 'h', 'm', 'e', 'm', '1'};
constexpr int kMaxWindows = 64;  // as many as Introduction::free_windows has bits

// Calls a function of the library that returns false where it has filled in a complaint.
template <class Call> void expect(const char* what, const Call& call) {
    Complaint complaint{};
    if (!call(&complaint))
        throw TransportError(concat("NVSHMEM: ", what, " failed: ", complaint.text,
                                    " (NVSHMEM_DEBUG=INFO says more; third-party/README.md)"));
}

// Throws unless `describe` says the same of all; names the ranks that say what.
void expect_same(const std::vector<Introduction>& all, const char* what,
                 const std::function<std::string(const Introduction&)>& describe) {
    const std::string first = describe(all.front());
    for (const Introduction& one : all)
        if (const std::string found = describe(one); found != first)
            throw TransportError(concat("NVSHMEM: ", what, " must be the same on every rank, got ", first,
                                        " on rank 0; ", found, " on rank ", one.rank));
}

// A world is made by all of its members at once, so ranks with and without one cannot meet.
void expect_same_world(const std::vector<Introduction>& all) {
    const auto old = std::find_if(all.begin(), all.end(), [](const auto& one) { return one.is_initialized != 0; });
    const auto fresh = std::find_if(all.begin(), all.end(), [](const auto& one) { return one.is_initialized == 0; });
    if (old == all.end() || fresh == all.end()) return;
    throw TransportError(
        concat("NVSHMEM: rank ", old->rank, " is in a world of ", old->num_pes, " members already, rank ", fresh->rank,
               " in none. A process has one world of NVSHMEM until it ends, which torch or "
               "an earlier Buffer has made, and nobody joins it later: start new processes for all ranks "
               "of this group, or use DEEP_EP_RAIL=host"));
}

std::string describe_versions(const Introduction& one) {
    return concat(text(one.loaded), " (engine built with ", text(one.built), ")");
}

}  // namespace

Transport transport_of(const std::string& remote_transport, bool is_ibgda_enabled) {
    if (is_ibgda_enabled || remote_transport == "ibgda") return Transport::kGpu;
    return remote_transport == "libfabric" ? Transport::kFencingProxy : Transport::kProxy;
}

World::World(const Library& library, Version loaded, Transport transport)
    : library_(library), loaded_(loaded), transport_(transport) {
    if (library.abi != kLibraryAbi || library.bytes != sizeof(Library))
        throw TransportError(
            "the library of the engine nvshmem is of another version of deep_ep: build it again with "
            "`python -m deep_ep build-nvshmem`");
    if (const std::string reason = why_unfit(library.built, loaded); !reason.empty())
        throw TransportError(concat("the engine nvshmem was ", reason,
                                    ". Build it for that one with `python -m deep_ep build-nvshmem`"));
}

Introduction World::introduce(int rank, size_t window_bytes) {
    const std::lock_guard lock(mutex_);
    Introduction own{};
    std::memcpy(own.magic, kMagic, sizeof(kMagic));
    own.rank = rank;
    own.built = library_.built;
    own.loaded = loaded_;
    own.window_bytes = window_bytes;
    own.transport = transport_;
    own.num_windows = static_cast<int32_t>(windows_.size());
    own.free_windows = free_windows(window_bytes);
    own.is_initialized = library_.is_initialized();
    if (own.is_initialized) {
        own.pe = library_.my_pe();
        own.num_pes = library_.num_pes();
    } else if (rank == 0) {
        expect("making an id", [&](Complaint* complaint) { return library_.make_unique_id(own.unique_id, complaint); });
    }
    return own;
}

uint64_t World::free_windows(size_t bytes) const {
    uint64_t found = 0;
    for (size_t i = 0; i < windows_.size(); ++i)
        if (windows_[i].is_free && windows_[i].bytes >= bytes) found |= uint64_t{1} << i;
    return found;
}

World::Lease World::meet(const std::vector<Introduction>& all, int rank, const void* on_device) {
    for (const Introduction& one : all)
        EP_CHECK(std::memcmp(one.magic, kMagic, sizeof(kMagic)) == 0, "rank ", &one - all.data(),
                 " uses another engine between nodes than nvshmem");
    expect_same(all, "its version", describe_versions);
    expect_same(all, "the size of the window", [](const auto& one) { return concat(one.window_bytes); });
    expect_same(all, "its transport (NVSHMEM_REMOTE_TRANSPORT, NVSHMEM_IB_ENABLE_IBGDA)", [](const auto& one) {
        static constexpr const char* kNames[] = {"IBGDA", "a proxy", "a proxy with fences (libfabric)"};
        return std::string(kNames[static_cast<size_t>(one.transport)]);
    });
    expect_same_world(all);
    expect_same(all, "the number of Buffers made so far", [](const auto& one) { return concat(one.num_windows); });

    const std::lock_guard lock(mutex_);
    if (!all.front().is_initialized)
        expect("its initialization", [&](Complaint* complaint) {
            return library_.initialize(on_device, all.front().unique_id, rank, static_cast<int>(all.size()), complaint);
        });
    static_cast<void>(pes_of(all));
    if (!std::exchange(has_joined_, true))
        expect("joining it", [&](Complaint* complaint) { return library_.join(on_device, complaint); });
    return take_window(all, on_device);
}

std::vector<int32_t> World::pes_of(const std::vector<Introduction>& all) const {
    std::vector<int32_t> pes;
    const int num_ranks = static_cast<int>(all.size());
    for (const Introduction& one : all) pes.push_back(one.is_initialized ? one.pe : one.rank);
    std::vector<int32_t> sorted = pes;
    std::sort(sorted.begin(), sorted.end());
    bool is_whole = true;
    for (int pe = 0; pe < num_ranks; ++pe) is_whole = is_whole && sorted[static_cast<size_t>(pe)] == pe;
    for (const Introduction& one : all) is_whole = is_whole && (!one.is_initialized || one.num_pes == num_ranks);
    if (!is_whole)
        throw TransportError(
            concat("NVSHMEM: its world has ", all.front().num_pes, " members and this group ", num_ranks,
                   " ranks. A process has one world of NVSHMEM, which torch or an earlier Buffer has made, "
                   "and Buffers over it must span all of it; DEEP_EP_RAIL=host has no such limit"));
    return pes;
}

World::Lease World::take_window(const std::vector<Introduction>& all, const void* on_device) {
    uint64_t common = ~uint64_t{0};
    for (const Introduction& one : all) common &= one.free_windows;
    const size_t bytes = all.front().window_bytes;
    if (common != 0) {
        const int number = std::countr_zero(common);
        Place& place = windows_[static_cast<size_t>(number)];
        place.is_free = false;
        return {number, place.address};
    }
    const int number = static_cast<int>(windows_.size());
    EP_CHECK(number < kMaxWindows, "NVSHMEM: at most ", kMaxWindows, " windows; destroy Buffers before making others");
    windows_.push_back({nullptr, bytes, false});
    void* address = nullptr;
    expect("the allocation of a window",
           [&](Complaint* complaint) { return library_.allocate(on_device, bytes, &address, complaint); });
    if (address == nullptr)
        throw TransportError(concat("NVSHMEM: its heap has no room for a window of ", bytes,
                                    " bytes: raise NVSHMEM_SYMMETRIC_SIZE, or ask for less with num_rdma_bytes"));
    windows_.back().address = address;
    return {number, address};
}

void World::barrier(const void* on_device) {
    expect("a barrier", [&](Complaint* complaint) { return library_.barrier(on_device, complaint); });
}

void World::give_back(int window) {
    const std::lock_guard lock(mutex_);
    windows_[static_cast<size_t>(window)].is_free = true;
}

}  // namespace deep_ep::rail::nvshmem
