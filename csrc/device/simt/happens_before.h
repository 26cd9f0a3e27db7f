// Tells ThreadSanitizer what orders what, and nothing else does: fibers are switched without synchronisation, and
// happens-before edges come from here alone. Built without EP_SIMT_TSAN, all of this is empty.
//
// A Key is a place where a clock can be left (release) and taken up (acquire) by the running TSan context, which is a
// CUDA thread, a stream, a bulk-copy engine, or the host. Memory accesses publish by (address, scope instance): what
// is released at scope S by a thread of block b on device d is seen by an acquire at scope T
//     in block b;  on device d, when S and T are at least gpu;  anywhere, when both are sys.
// Every context also has a second clock, for the async proxy: what bulk copies may read. It follows the same edges,
// but a thread's own generic accesses enter it only at a proxy fence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/non_copyable.h"

namespace deep_ep::simt::hb {

using Key = uint32_t;  // 0: none

enum class Proxy { kGeneric, kAsync };

#if defined(EP_SIMT_TSAN)

constexpr bool kIsEnabled = true;

struct Agent;  // what is known about one CUDA thread

// Executor code that allocates, or that reads what several contexts wrote, runs under this: TSan looks away.
class Quiet : NonCopyable {
public:
    Quiet();
    ~Quiet();
};

Key make_key();
void add_reference(Key key);
void drop(Key key);
void release(Key key);  // adds the running context's clock; the first release of a key sets it
void release_anew(Key key);
void acquire(Key key);

void* create_context(const char* name);
void destroy_context(void* context);
void* current_context();
// Runs as another context, on the same stack.
class As : NonCopyable {
public:
    explicit As(void* context);
    ~As();

private:
    void* previous_;
};

void* context_of(const Agent* agent);

// The agents of a stream's kernels. ThreadSanitizer keeps 255 contexts apart, so the threads of a kernel continue those of
// the kernels before it in the stream, after which they come anyway.
class AgentPool : NonCopyable {
public:
    AgentPool() = default;
    ~AgentPool();

    Agent* take(uint64_t block, const void* device, bool has_bulk_copy, const char* name);
    void give_back(Agent* agent);
    void end_kernel();  // from here on, what was given back may be taken again: blocks of a kernel are not ordered

private:
    std::vector<Agent*> spare_, used_;
};

// Memory accesses of the running thread (or the host). Scope: 0 cta, 1 gpu, 2 sys.
void on_load(const void* address, bool is_acquire, int scope);
void on_store(const void* address, bool is_release, int scope);
void on_update(const void* address, bool is_acquire, bool is_release, int scope);
void on_fence(int scope);
void on_proxy_fence();

// Packets: data that carry their epoch. A load that finds its epoch reads what the store wrote, at the scopes of both,
// and takes up nothing else of the writer's clock. The next store comes after all such loads, or it is a race.
void on_packet_store(const void* address, int scope);
void on_packet_load(const void* address, int scope);

// mbarriers: a key per phase parity.
void on_mbarrier_init(const void* address);
void on_mbarrier_arrive(const void* address, uint32_t phase, bool is_first);
void on_mbarrier_wait(const void* address, uint32_t phase);
void on_mbarrier_use(const void* address);

// Bulk copies: their reads and writes come after what the async proxy sees at the issue.
struct BulkEdges {
    Key before = 0;
    Key read_done = 0;
    Key write_done = 0;
};
BulkEdges on_bulk_issue(Agent* issuer, int group, const void* mbarrier);  // mbarrier: of a load, else null
void on_bulk_read(Agent* issuer, const BulkEdges& edges, const void* address, size_t bytes);
void on_bulk_write(Agent* issuer, const BulkEdges& edges, void* address, size_t bytes);
void on_bulk_load_done(Agent* issuer, const void* mbarrier, uint32_t phase, bool is_first);
void on_bulk_wait(Agent* issuer, int group, bool reads_only);
void on_bulk_end(Agent* issuer, Key kernel_end);

#else

constexpr bool kIsEnabled = false;

struct Agent;
class Quiet : NonCopyable {
public:
    Quiet() {}
    ~Quiet() {}
};
class As : NonCopyable {
public:
    explicit As(void*) {}
    ~As() {}
};
struct BulkEdges {};

inline Key make_key() { return 0; }
inline void add_reference(Key) {}
inline void drop(Key) {}
inline void release(Key) {}
inline void release_anew(Key) {}
inline void acquire(Key) {}
inline void* create_context(const char*) { return nullptr; }
inline void destroy_context(void*) {}
inline void* current_context() { return nullptr; }
inline void* context_of(const Agent*) { return nullptr; }
class AgentPool : NonCopyable {
public:
    Agent* take(uint64_t, const void*, bool, const char*) { return nullptr; }
    void give_back(Agent*) {}
    void end_kernel() {}
};
inline void on_load(const void*, bool, int) {}
inline void on_store(const void*, bool, int) {}
inline void on_update(const void*, bool, bool, int) {}
inline void on_fence(int) {}
inline void on_proxy_fence() {}
inline void on_packet_store(const void*, int) {}
inline void on_packet_load(const void*, int) {}
inline void on_mbarrier_init(const void*) {}
inline void on_mbarrier_arrive(const void*, uint32_t, bool) {}
inline void on_mbarrier_wait(const void*, uint32_t) {}
inline void on_mbarrier_use(const void*) {}
inline BulkEdges on_bulk_issue(Agent*, int, const void*) { return {}; }
inline void on_bulk_read(Agent*, const BulkEdges&, const void*, size_t) {}
inline void on_bulk_write(Agent*, const BulkEdges&, void*, size_t) {}
inline void on_bulk_load_done(Agent*, const void*, uint32_t, bool) {}
inline void on_bulk_wait(Agent*, int, bool) {}
inline void on_bulk_end(Agent*, Key) {}

#endif

}  // namespace deep_ep::simt::hb
