#include "device/simt/happens_before.h"

#if defined(EP_SIMT_TSAN)

#include <sanitizer/tsan_interface.h>
#include <sanitizer/tsan_interface_atomic.h>
#include <sys/mman.h>

#include <algorithm>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device/simt/block.h"
#include "device/simt/quiet_mutex.h"

extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void __tsan_write8(void* address);
void __tsan_read8_pc(void* address, void* pc);
void __tsan_write8_pc(void* address, void* pc);
}

namespace deep_ep::simt::hb {

// What one store, update or fence has left at an address.
struct Published {
    Key key;
    int scope;
    uint64_t block;
    const void* device;
    bool is_shared;  // the key of a fence, which other addresses may hold as well
};

struct Seen {
    Published what;
    int scope;  // of the load
};

struct StoreGroup {
    int group;
    Key read_done;
    Key write_done;
};

struct Agent {
    uint64_t block;
    const void* device;
    void* generic;
    void* async;             // null where the device has no bulk copies: contexts are few
    void* reader = nullptr;  // of its bulk copies; made when needed
    void* writer = nullptr;
    Key last_fence[3] = {0, 0, 0};
    std::vector<Seen> seen;  // by relaxed loads, for a later fence
    std::vector<StoreGroup> groups;
};

namespace {

constexpr int kSys = 2;
constexpr size_t kMaxKeys = 1 << 22;
constexpr size_t kMaxSeen = 64;
constexpr size_t kFreshWords = 1 << 16;  // at a time

struct KeyState {
    uint32_t num_references;
    bool is_fresh;
};

struct MBarrierKeys {
    Key phase[2] = {0, 0};
};

// A place for packets, and who has written what is there. ThreadSanitizer sees accesses to words of its own in place of the
// packet's; see on_packet_store.
struct PacketPlace {
    uint64_t* read = nullptr;     // by readers of what is there now
    uint64_t* written = nullptr;  // by the store that has put it there
    Published store = {};
};

struct Tables {
    QuietMutex lock;
    std::vector<KeyState> keys{1};
    std::vector<Key> free_keys;
    char* cells = nullptr;  // 16 bytes a key: the clock of the generic proxy and that of the async proxy
    std::unordered_map<const void*, std::vector<Published>> published;
    std::unordered_map<const void*, MBarrierKeys> mbarriers;
    std::unordered_map<const void*, PacketPlace> packets;
    uint64_t* fresh_words = nullptr;  // that ThreadSanitizer has seen no access to
    size_t num_fresh_words = 0;
};

void* map_untouched(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

Tables& tables() {
    static Tables* const instance = [] {
        auto* made = new Tables;
        made->cells = static_cast<char*>(map_untouched(kMaxKeys * 16));
        return made;
    }();
    return *instance;
}

void* cell(Key key, Proxy proxy) {
    return tables().cells + static_cast<size_t>(key) * 16 + (proxy == Proxy::kAsync ? 8 : 0);
}

void set_clock(void* cell) {
    __tsan_atomic32_store(static_cast<__tsan_atomic32*>(cell), 0, __tsan_memory_order_release);
}
void merge_clock(void* cell) { __tsan_release(cell); }

// The running CUDA thread, unless the code runs as somebody else for the moment.
Agent* running_agent() {
    if (current_fiber == nullptr || current_fiber->agent == nullptr) return nullptr;
    return __tsan_get_current_fiber() == current_fiber->agent->generic ? current_fiber->agent : nullptr;
}

// Knows next to nothing.
void* blank_context() {
    static void* const context = __tsan_create_fiber(0);
    return context;
}

template <class Operation> void with_async_clock(Operation operation) {
    if (Agent* agent = running_agent()) {
        As as(agent->async == nullptr ? blank_context() : agent->async);
        operation();
    } else {
        operation();
    }
}

bool is_visible(const Published& what, int load_scope, const Agent* reader) {
    const int scope = std::min(what.scope, load_scope);
    if (scope == kSys) return true;
    if (reader == nullptr) return false;
    if (scope == 1 && what.device == reader->device) return true;
    return what.block == reader->block;
}

void drop_all(std::vector<Published>& list) {
    for (const Published& what : list) drop(what.key);
    list.clear();
}

void publish_own_clock(std::vector<Published>& list, const Agent* agent, int scope) {
    const uint64_t block = agent == nullptr ? 0 : agent->block;
    const void* device = agent == nullptr ? nullptr : agent->device;
    for (const Published& what : list) {
        if (what.is_shared || what.scope != scope || what.block != block || what.device != device) continue;
        release(what.key);
        return;
    }
    list.push_back({make_key(), scope, block, device, false});
    release(list.back().key);
}

// A relaxed store after a fence publishes what the fence had ordered.
void publish_fences(std::vector<Published>& list, const Agent* agent, int scope) {
    if (agent == nullptr) return;
    for (int fence_scope = 0; fence_scope <= kSys; ++fence_scope) {
        const Key key = agent->last_fence[fence_scope];
        if (key == 0) continue;
        add_reference(key);
        list.push_back({key, std::min(fence_scope, scope), agent->block, agent->device, true});
    }
}

void take_up(const std::vector<Published>& list, Agent* agent, bool is_acquire, int scope) {
    for (const Published& what : list) {
        if (is_acquire) {
            if (is_visible(what, scope, agent)) acquire(what.key);
            continue;
        }
        if (agent == nullptr) continue;
        auto& seen = agent->seen;
        const auto is_same = [&](const Seen& old) { return old.what.key == what.key && old.scope == scope; };
        if (std::any_of(seen.begin(), seen.end(), is_same)) continue;
        if (seen.size() == kMaxSeen) {
            drop(seen.front().what.key);
            seen.erase(seen.begin());
        }
        add_reference(what.key);
        seen.push_back({what, scope});
    }
}

}  // namespace

Quiet::Quiet() { __tsan_ignore_thread_begin(); }
Quiet::~Quiet() { __tsan_ignore_thread_end(); }

As::As(void* context) : previous_(__tsan_get_current_fiber()) {
    __tsan_switch_to_fiber(context, __tsan_switch_to_fiber_no_sync);
}
As::~As() { __tsan_switch_to_fiber(previous_, __tsan_switch_to_fiber_no_sync); }

Key make_key() {
    Quiet quiet;
    Tables& all = tables();
    std::lock_guard lock(all.lock);
    Key key;
    if (all.free_keys.empty()) {
        if (all.keys.size() == kMaxKeys) throw Error("the executor has run out of keys for ThreadSanitizer");
        key = static_cast<Key>(all.keys.size());
        all.keys.push_back({});
    } else {
        key = all.free_keys.back();
        all.free_keys.pop_back();
    }
    all.keys[key] = {1, true};
    return key;
}

void add_reference(Key key) {
    std::lock_guard lock(tables().lock);
    ++tables().keys[key].num_references;
}

void drop(Key key) {
    if (key == 0) return;
    Quiet quiet;
    std::lock_guard lock(tables().lock);
    if (--tables().keys[key].num_references == 0) tables().free_keys.push_back(key);
}

void release(Key key) {
    if (tables().keys[key].is_fresh) return release_anew(key);
    merge_clock(cell(key, Proxy::kGeneric));
    with_async_clock([&] { merge_clock(cell(key, Proxy::kAsync)); });
}

void release_anew(Key key) {
    tables().keys[key].is_fresh = false;
    set_clock(cell(key, Proxy::kGeneric));
    with_async_clock([&] { set_clock(cell(key, Proxy::kAsync)); });
}

void acquire(Key key) {
    if (key == 0 || tables().keys[key].is_fresh) return;
    __tsan_acquire(cell(key, Proxy::kGeneric));
    if (Agent* agent = running_agent(); agent != nullptr && agent->async != nullptr) {
        As as(agent->async);
        __tsan_acquire(cell(key, Proxy::kAsync));
    }
}

// A new context knows what its creator knows.
void* create_context(const char* name) {
    As as(blank_context());
    Quiet quiet;
    void* context = __tsan_create_fiber(0);
    __tsan_set_fiber_name(context, name);
    return context;
}

void destroy_context(void* context) {
    Quiet quiet;
    if (context != nullptr) __tsan_destroy_fiber(context);
}

void* current_context() { return __tsan_get_current_fiber(); }

Agent* AgentPool::take(uint64_t block, const void* device, bool has_bulk_copy, const char* name) {
    Quiet quiet;
    if (spare_.empty()) {
        auto* agent = new Agent{.block = block, .device = device, .generic = create_context(name), .async = nullptr};
        if (has_bulk_copy) agent->async = create_context("async proxy");
        return agent;
    }
    Agent* agent = spare_.back();
    spare_.pop_back();
    agent->block = block;
    __tsan_set_fiber_name(agent->generic, name);
    return agent;
}

void AgentPool::give_back(Agent* agent) {
    Quiet quiet;
    for (Key& key : agent->last_fence) drop(std::exchange(key, 0));
    for (const Seen& seen : agent->seen) drop(seen.what.key);
    for (const StoreGroup& group : agent->groups) {
        drop(group.read_done);
        drop(group.write_done);
    }
    agent->seen.clear();
    agent->groups.clear();
    used_.push_back(agent);
}

void AgentPool::end_kernel() {
    Quiet quiet;
    spare_.insert(spare_.end(), used_.rbegin(), used_.rend());
    used_.clear();
}

AgentPool::~AgentPool() {
    Quiet quiet;
    end_kernel();
    for (Agent* agent : spare_) {
        for (void* context : {agent->generic, agent->async, agent->reader, agent->writer}) destroy_context(context);
        delete agent;
    }
}

void* context_of(const Agent* agent) { return agent->generic; }

void on_load(const void* address, bool is_acquire, int scope) {
    Quiet quiet;
    const auto found = tables().published.find(address);
    if (found != tables().published.end()) take_up(found->second, running_agent(), is_acquire, scope);
}

void on_store(const void* address, bool is_release, int scope) {
    Quiet quiet;
    Agent* agent = running_agent();
    auto& list = tables().published[address];
    drop_all(list);  // a store ends the release sequence of what was there
    if (is_release) {
        publish_own_clock(list, agent, scope);
    } else {
        publish_fences(list, agent, scope);
    }
}

void on_update(const void* address, bool is_acquire, bool is_release, int scope) {
    Quiet quiet;
    Agent* agent = running_agent();
    auto& list = tables().published[address];
    take_up(list, agent, is_acquire, scope);
    if (is_release) {
        publish_own_clock(list, agent, scope);
    } else {
        publish_fences(list, agent, scope);
    }
}

void on_fence(int scope) {
    Agent* agent = running_agent();
    if (agent == nullptr) return;
    Quiet quiet;
    for (const Seen& seen : agent->seen) {
        if (is_visible(seen.what, std::min(seen.scope, scope), agent)) acquire(seen.what.key);
    }
    Key& key = agent->last_fence[scope];
    drop(key);
    key = make_key();
    release(key);
}

// From here on the async proxy sees what this thread sees. (The other way round needs no fence: the completion of a
// bulk copy is one.)
void on_proxy_fence() {
    Agent* agent = running_agent();
    if (agent == nullptr || agent->async == nullptr) return;
    Quiet quiet;
    const Key key = make_key();
    set_clock(cell(key, Proxy::kGeneric));
    {
        As as(agent->async);
        __tsan_acquire(cell(key, Proxy::kGeneric));
    }
    drop(key);
}

namespace {

uint64_t* fresh_word() {
    Tables& all = tables();
    if (all.num_fresh_words == 0) {
        all.fresh_words = static_cast<uint64_t*>(map_untouched(kFreshWords * sizeof(uint64_t)));
        all.num_fresh_words = kFreshWords;
    }
    return all.fresh_words + --all.num_fresh_words;
}

}  // namespace

// A store ends the use before it: it writes the words that the store and the readers of that use have touched, so that one
// which does not come before it races with it. Readers of the new use read a word that nobody has written, so the store
// and they do not race. Words are fresh each time: ThreadSanitizer reports an address once.
void on_packet_store(const void* address, int scope) {
    PacketPlace ended, begun;
    {
        Quiet quiet;
        const Agent* agent = running_agent();
        const uint64_t block = agent == nullptr ? 0 : agent->block;
        const void* device = agent == nullptr ? nullptr : agent->device;
        begun = {fresh_word(), fresh_word(), {0, scope, block, device, false}};
        ended = std::exchange(tables().packets[address], begun);
    }
    void* const place_in_kernel = __builtin_return_address(0);  // where a report is to point
    if (ended.read != nullptr) __tsan_write8_pc(ended.read, place_in_kernel);
    if (ended.written != nullptr) __tsan_write8_pc(ended.written, place_in_kernel);
    __tsan_write8_pc(begun.written, place_in_kernel);
}

// Where the scopes of store and load do not reach each other the epoch makes nothing right: the load races with the store.
void on_packet_load(const void* address, int scope) {
    uint64_t* read;
    uint64_t* written = nullptr;
    {
        Quiet quiet;
        const auto found = tables().packets.find(address);
        if (found == tables().packets.end()) return;  // of a process that is not watched
        read = found->second.read;
        if (!is_visible(found->second.store, scope, running_agent())) written = found->second.written;
    }
    void* const place_in_kernel = __builtin_return_address(0);
    __tsan_read8_pc(read, place_in_kernel);
    if (written != nullptr) __tsan_read8_pc(written, place_in_kernel);
}

void on_mbarrier_init(const void* address) {
    {
        Quiet quiet;
        auto& keys = tables().mbarriers[address];
        for (Key& key : keys.phase) {
            drop(key);
            key = make_key();
        }
    }
    __tsan_write8(const_cast<void*>(address));
}

void on_mbarrier_use(const void* address) {
    __tsan_atomic64_load(static_cast<const volatile __tsan_atomic64*>(address), __tsan_memory_order_relaxed);
}

void on_mbarrier_arrive(const void* address, uint32_t phase, bool is_first) {
    Quiet quiet;
    const Key key = tables().mbarriers[address].phase[phase & 1];
    if (is_first) {
        release_anew(key);
    } else {
        release(key);
    }
}

void on_mbarrier_wait(const void* address, uint32_t phase) {
    Quiet quiet;
    acquire(tables().mbarriers[address].phase[phase & 1]);
}

BulkEdges on_bulk_issue(Agent* issuer, int group, const void* mbarrier) {
    const bool is_store = mbarrier == nullptr;
    if (!is_store) {  // the async proxy must know that it is initialised
        As as(issuer->async);
        on_mbarrier_use(mbarrier);
    }
    Quiet quiet;
    if (issuer->reader == nullptr) {
        issuer->reader = create_context("bulk copy, read");
        issuer->writer = create_context("bulk copy, write");
    }
    const BulkEdges edges{make_key(), make_key(), make_key()};
    {
        As as(issuer->async);
        set_clock(cell(edges.before, Proxy::kGeneric));
    }
    if (is_store) {
        add_reference(edges.read_done);
        add_reference(edges.write_done);
        issuer->groups.push_back({group, edges.read_done, edges.write_done});
    }
    return edges;
}

void on_bulk_read(Agent* issuer, const BulkEdges& edges, const void* address, size_t bytes) {
    As as(issuer->reader);
    __tsan_acquire(cell(edges.before, Proxy::kGeneric));
    __tsan_read_range(const_cast<void*>(address), bytes);
    release(edges.read_done);
}

void on_bulk_write(Agent* issuer, const BulkEdges& edges, void* address, size_t bytes) {
    {
        As as(issuer->writer);
        __tsan_acquire(cell(edges.before, Proxy::kGeneric));
        acquire(edges.read_done);
        __tsan_write_range(address, bytes);
        release(edges.write_done);
    }
    for (Key key : {edges.before, edges.read_done, edges.write_done}) drop(key);
}

void on_bulk_load_done(Agent* issuer, const void* mbarrier, uint32_t phase, bool is_first) {
    As as(issuer->writer);
    on_mbarrier_use(mbarrier);
    on_mbarrier_arrive(mbarrier, phase, is_first);
}

void on_bulk_wait(Agent* issuer, int group, bool reads_only) {
    Quiet quiet;
    std::erase_if(issuer->groups, [&](const StoreGroup& waited) {
        if (waited.group >= group) return false;
        acquire(waited.read_done);
        if (reads_only) return false;
        acquire(waited.write_done);
        drop(waited.read_done);
        drop(waited.write_done);
        return true;
    });
}

void on_bulk_end(Agent* issuer, Key kernel_end) {
    for (void* context : {issuer->reader, issuer->writer}) {
        if (context == nullptr) continue;
        As as(context);
        release(kernel_end);
    }
}

}  // namespace deep_ep::simt::hb

#endif
