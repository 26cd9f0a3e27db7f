// The host half of an engine: what carries bytes between nodes. Kernels use the device half, rail/rail.h, and learn no
// engine's name. What both may rely on: docs/protocols/internode.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core/non_copyable.h"

namespace deep_ep::rail {

// Memory of the same size on every rank. An engine sends from it and receives into it, and device code may use it.
struct Window {
    void* host = nullptr;  // null where the host cannot reach it
    void* device = nullptr;
    size_t bytes = 0;
};

// What the device half needs, for the parameters of a kernel. Its meaning is the engine's own.
struct Params {
    static constexpr size_t kMaxBytes = 96;
    alignas(16) unsigned char bytes[kMaxBytes] = {};

    template <class View> static Params of(const View& view) {
        static_assert(sizeof(View) <= kMaxBytes);
        Params params;
        std::memcpy(params.bytes, &view, sizeof(view));
        return params;
    }
};

struct Traffic {
    uint64_t num_messages = 0;  // puts, sets and adds
    uint64_t num_bytes = 0;     // of puts, without the engine's headers
};

class Engine : NonCopyable {
public:
    virtual ~Engine() = default;

    virtual std::string name() const = 0;  // and version, for people
    // Plain bytes that every rank must get from every other before connect().
    virtual std::string address() const = 0;
    // Collective. `addresses` by rank; `peers`: the ranks that this one will exchange messages with, who name it too. Once.
    virtual void connect(const std::vector<std::string>& addresses, const std::vector<int>& peers) = 0;
    // Collective in the group, after connect(). `neighbours`: the ranks of this node, this one among them. The window of each, for loads
    // by this rank's kernels: who has seen a flag there may read what it guards, after rail::confirm_at(). None where the engine
    // cannot promise that to every rank: so all ranks get some, or none does.
    virtual std::vector<const uint8_t*> share_windows(const std::vector<int>& neighbours) = 0;

    virtual Window window() const = 0;
    virtual Params params() const = 0;
    virtual size_t chunk_bytes() const = 0;  // what a put should have, where the caller can choose

    // The same as the device half's set(), for a host that gives up.
    virtual void set(int peer, uint64_t flag, uint64_t value) = 0;

    // Throws TransportError with what has gone wrong so far, if anything has.
    virtual void check() const = 0;
    // The same where peers may be lost: a broken connection is nothing that has gone wrong.
    virtual void check_itself() const { check(); }
    // This peer has released its engine in order. False where an engine cannot know it: what is said of a failure then lacks it.
    virtual bool has_left(int) const { return false; }
    // Why nothing goes to this peer, or comes from it, any more; empty: the engine knows of no loss.
    virtual std::string loss_of(int) const { return {}; }
    // What has been posted to this peer so far.
    virtual Traffic sent_to(int peer) const = 0;

    // No kernel uses the engine any more. What was posted is sent first, for as long as `timeout_s`. Never collective;
    // idempotent; throws nothing. A window that is shared lives as long as the engine, beyond this.
    virtual void release(double timeout_s) = 0;
};

}  // namespace deep_ep::rail
