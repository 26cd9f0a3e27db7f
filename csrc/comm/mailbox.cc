#include "comm/mailbox.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>

#include "core/error.h"
#include "core/mapped_file.h"
#include "core/text.h"

namespace deep_ep::comm {

namespace {

constexpr size_t kPageBytes = 8192;                 // more than half of it is free for what else ranks will have to say
constexpr uint64_t kMagic = 0x3130'786f'6265'5045;  // "EPebox01"
constexpr int kMaxReads = 1000;                     // of a text that changes meanwhile

uint64_t monotonic_ns() {
    return static_cast<uint64_t>(std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

// A text that one thread at a time writes and anybody reads: a sequence lock over words, each of them atomic.
struct SharedText {
    std::atomic<uint64_t> version;  // odd: being written
    std::atomic<uint64_t> num_bytes;
    std::atomic<uint64_t> words[Mailbox::kMaxTextBytes / sizeof(uint64_t)];

    void write(std::string_view text) {
        text = whole_letters(text, Mailbox::kMaxTextBytes);
        const size_t size = text.size();
        const uint64_t begun = version.load(std::memory_order_relaxed) | 1;
        version.store(begun, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_release);
        for (size_t at = 0; at < size; at += sizeof(uint64_t)) {
            uint64_t word = 0;
            std::memcpy(&word, text.data() + at, std::min(sizeof(word), size - at));
            words[at / sizeof(word)].store(word, std::memory_order_relaxed);
        }
        num_bytes.store(size, std::memory_order_relaxed);
        version.store(begun + 1, std::memory_order_release);  // pairs with: read
    }

    // Empty: nothing was written, or whoever writes does not come to an end.
    std::string read() const {
        for (int attempt = 0; attempt < kMaxReads; ++attempt) {
            const uint64_t before = version.load(std::memory_order_acquire);
            if (before % 2 != 0) continue;
            const size_t size = std::min<size_t>(num_bytes.load(std::memory_order_relaxed), Mailbox::kMaxTextBytes);
            std::string text(size, '\0');
            for (size_t at = 0; at < size; at += sizeof(uint64_t)) {
                const uint64_t word = words[at / sizeof(word)].load(std::memory_order_relaxed);
                std::memcpy(text.data() + at, &word, std::min(sizeof(word), size - at));
            }
            std::atomic_thread_fence(std::memory_order_acquire);
            if (version.load(std::memory_order_relaxed) == before) return text;
        }
        return "";
    }
};

using Nonce = std::array<char, 32>;  // hexadecimal

using PidNamespace = std::array<char, 32>;  // a text; empty where it cannot be told

// Names a process for good: ids are used again, and every container may have a process 1.
struct ProcessName {
    int64_t pid = 0;
    uint64_t start_time = 0;  // in clock ticks since the boot
    PidNamespace pid_namespace = {};
};

// What a peer maps. The plain fields are written before the handle leaves this process.
struct PageContent {
    uint64_t magic;
    Nonce nonce;
    ProcessName owner;
    int32_t num_ranks;
    int32_t is_locked;                  // see lock_page
    std::atomic<uint32_t> num_readers;  // that have opened the page
    std::atomic<uint32_t> has_left;
    SharedText abort;
    std::atomic<uint64_t> refused_ns;
    SharedText refusal;
};
static_assert(sizeof(PageContent) <= kPageBytes);
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

struct PageHandle {
    uint64_t magic;
    int64_t pid;
    int64_t fd;
    Nonce nonce;
};

Nonce random_nonce() {
    std::array<unsigned char, 16> random;
    if (getrandom(random.data(), random.size(), 0) != static_cast<ssize_t>(random.size()))
        throw TransportError(concat("getrandom: ", std::strerror(errno)));
    Nonce nonce;
    for (size_t i = 0; i < random.size(); ++i) {
        nonce[2 * i] = "0123456789abcdef"[random[i] >> 4];
        nonce[2 * i + 1] = "0123456789abcdef"[random[i] & 15];
    }
    return nonce;
}

// In the folder that processes of one IPC namespace share.
std::string path_of(const Nonce& nonce) { return "/dev/shm/deep_ep-" + std::string(nonce.data(), nonce.size()); }

// 0: there is no such process, or it has ended and only its parent has not looked yet.
uint64_t start_time_of(int64_t pid) {
    std::string line;
    std::getline(std::ifstream(concat("/proc/", pid, "/stat")), line);
    // "pid (name) state ..."; the name may have anything in it.
    const size_t name_end = line.rfind(')');
    if (name_end == std::string::npos) return 0;
    std::istringstream fields(line.substr(name_end + 1));
    std::string state, skipped;
    fields >> state;
    if (state == "Z" || state == "X") return 0;
    for (int field = 4; field < 22; ++field) fields >> skipped;
    uint64_t start_time = 0;
    fields >> start_time;
    return start_time;
}

PidNamespace this_pid_namespace() {
    PidNamespace name = {};
    static_cast<void>(readlink("/proc/self/ns/pid", name.data(), name.size() - 1));
    return name;
}

ProcessName this_process() {
    const int64_t pid = getpid();
    return {pid, start_time_of(pid), this_pid_namespace()};
}

// A record lock is the process's own: children do not inherit it, and the kernel drops it when the process ends, whatever
// namespace that lives in. It is dropped too when the process closes any descriptor of the file: see Registry.
struct flock whole_page() {
    struct flock lock {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    return lock;
}

bool lock_page(int fd) {
    struct flock lock = whole_page();
    return fcntl(fd, F_SETLK, &lock) == 0;
}

bool is_page_locked(int fd) {
    struct flock lock = whole_page();
    return fcntl(fd, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

PageContent* content_of(const MappedFile& memory) { return static_cast<PageContent*>(memory.address()); }

}  // namespace

// One rank's page as this process maps it. The descriptor stays open for the lock.
class MailboxPage : NonCopyable {
public:
    MailboxPage(FileDescriptor file, MappedFile memory, bool is_own)
        : file_(std::move(file)), memory_(std::move(memory)), content_(content_of(memory_)), is_own_(is_own) {}
    ~MailboxPage() {
        if (is_own_ && content_->owner.pid == getpid()) unlink(path_of(content_->nonce).c_str());
    }

    PageContent& content() const { return *content_; }
    bool is_of_this_process() const { return is_own_ && content_->owner.pid == getpid(); }

    // The last reader removes the name, so that nothing is left behind by a process that is killed later.
    void count_reader() {
        if (content_->num_readers.fetch_add(1) + 2 == static_cast<uint32_t>(content_->num_ranks))
            unlink(path_of(content_->nonce).c_str());
    }

    // Two witnesses, because memory is freed on their word: the lock, and the process itself where it can be seen.
    bool is_owner_gone() const {
        if (is_of_this_process()) return false;
        const ProcessName& owner = content_->owner;
        const bool can_see = owner.pid_namespace[0] != 0 && owner.pid_namespace == this_pid_namespace();
        if (content_->is_locked == 0 && !can_see) return false;  // nothing can be told
        if (content_->is_locked != 0 && is_page_locked(file_.get())) return false;
        return !can_see || start_time_of(owner.pid) != owner.start_time;
    }

private:
    FileDescriptor file_;
    MappedFile memory_;
    PageContent* content_;
    bool is_own_;
};

namespace {

// The pages that this process has made. A rank opens those of ranks in the same process here, and not by their name:
// closing such a second descriptor would drop the lock.
class Registry {
public:
    void add(const Nonce& nonce, const std::shared_ptr<MailboxPage>& page) {
        const std::lock_guard lock(mutex_);
        std::erase_if(pages_, [](const auto& entry) { return entry.second.expired(); });
        pages_[nonce] = page;
    }
    std::shared_ptr<MailboxPage> find(const Nonce& nonce) {
        const std::lock_guard lock(mutex_);
        const auto found = pages_.find(nonce);
        return found == pages_.end() ? nullptr : found->second.lock();
    }

private:
    std::mutex mutex_;
    std::map<Nonce, std::weak_ptr<MailboxPage>> pages_;
};

Registry& registry() {
    static auto* const instance = new Registry;  // never destroyed: Buffers in static objects may outlive it
    return *instance;
}

// Gives the file its page now: a store to a page for which a full /dev/shm has no room ends the process (SIGBUS).
bool reserve(const FileDescriptor& file) {
    if (!file) return false;
    const int error = posix_fallocate(file.get(), 0, kPageBytes);
    if (error != 0) errno = error;
    return error == 0;
}

FileDescriptor create_file(const Nonce& nonce) {
    const std::string path = path_of(nonce);
    FileDescriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (reserve(file)) return file;
    if (file) unlink(path.c_str());
    // Peers that see this process reach it through /proc as well.
    const std::string name = "deep_ep-" + std::string(nonce.data(), nonce.size());
    file = FileDescriptor(memfd_create(name.c_str(), MFD_CLOEXEC));
    if (!reserve(file)) throw TransportError(concat("cannot make the mailbox ", path, ": ", std::strerror(errno)));
    return file;
}

std::shared_ptr<MailboxPage> make_page(int num_ranks, std::string& handle_bytes) {
    const Nonce nonce = random_nonce();
    FileDescriptor file = create_file(nonce);
    MappedFile memory(file, kPageBytes);
    if (!memory) {
        const int error = errno;
        unlink(path_of(nonce).c_str());
        throw TransportError(concat("cannot allocate the mailbox ", path_of(nonce), ": ", std::strerror(error)));
    }
    PageContent* const content = content_of(memory);
    const int fd = file.get();
    content->nonce = nonce;
    content->owner = this_process();
    content->num_ranks = num_ranks;
    content->is_locked = lock_page(fd) ? 1 : 0;
    content->magic = kMagic;
    auto page = std::make_shared<MailboxPage>(std::move(file), std::move(memory), true);
    registry().add(nonce, page);
    if (num_ranks == 1) unlink(path_of(nonce).c_str());
    const PageHandle handle{kMagic, content->owner.pid, fd, nonce};
    handle_bytes.assign(reinterpret_cast<const char*>(&handle), sizeof(handle));
    return page;
}

// By its name where peers share /dev/shm, through /proc where they share process ids.
std::shared_ptr<MailboxPage> open_page(const std::string& handle_bytes, int peer) {
    PageHandle handle{};
    if (handle_bytes.size() == sizeof(handle)) std::memcpy(&handle, handle_bytes.data(), sizeof(handle));
    if (handle.magic != kMagic)
        throw TransportError(concat("not a handle of a mailbox: expected ", sizeof(handle), " bytes, got ",
                                    handle_bytes.size(), ". Do all ranks run the same version?"));
    if (auto page = registry().find(handle.nonce)) return page;
    for (const std::string& path : {path_of(handle.nonce), concat("/proc/", handle.pid, "/fd/", handle.fd)}) {
        FileDescriptor file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
        struct stat status {};
        if (!file || fstat(file.get(), &status) != 0 || status.st_size != static_cast<off_t>(kPageBytes)) continue;
        MappedFile memory(file, kPageBytes);
        const PageContent* content = content_of(memory);
        if (content != nullptr && content->magic == kMagic && content->nonce == handle.nonce)
            return std::make_shared<MailboxPage>(std::move(file), std::move(memory), false);
    }
    throw TransportError(concat("cannot reach the mailbox of rank ", peer, " (process ", handle.pid,
                                "): ranks of a node must share /dev/shm (containers: --ipc=host) or see each other's "
                                "processes (--pid=host, same user), and the process must be there"));
}

}  // namespace

Mailbox::Mailbox(int rank, int num_ranks) : rank_(rank), pages_(static_cast<size_t>(num_ranks)) {
    pages_[static_cast<size_t>(rank)] = make_page(num_ranks, handle_);
}

Mailbox::~Mailbox() = default;

void Mailbox::connect(const std::vector<std::string>& handles) {
    EP_ENSURE(handles.size() == pages_.size(), "handles: expected one for each of ", pages_.size(), " ranks, got ",
              handles.size());
    for (size_t peer = 0; peer < handles.size(); ++peer) {
        if (peer == static_cast<size_t>(rank_)) continue;
        pages_[peer] = open_page(handles[peer], static_cast<int>(peer));
        pages_[peer]->count_reader();
    }
}

bool Mailbox::speaks() const { return pages_[static_cast<size_t>(rank_)]->is_of_this_process(); }

const MailboxPage* Mailbox::page_of(int peer) const { return pages_[static_cast<size_t>(peer)].get(); }

void Mailbox::tell_left() {
    // Pairs with: presence. The peer frees memory once it has seen this.
    if (speaks()) page_of(rank_)->content().has_left.store(1, std::memory_order_release);
}

Presence Mailbox::presence(int peer) const {
    const MailboxPage* page = page_of(peer);
    if (page == nullptr) return Presence::kHere;
    if (page->content().has_left.load(std::memory_order_acquire) != 0) return Presence::kLeft;
    if (!page->is_owner_gone()) return Presence::kHere;
    // It may have told, and then ended, between the two looks.
    return page->content().has_left.load(std::memory_order_acquire) != 0 ? Presence::kLeft : Presence::kGone;
}

bool Mailbox::note_abort(std::string_view reason) {
    SharedText& text = page_of(rank_)->content().abort;
    if (!speaks() || text.version.load(std::memory_order_relaxed) != 0) return false;
    text.write(reason);
    return true;
}

std::optional<std::string> Mailbox::abort_note(int peer) const {
    const MailboxPage* page = page_of(peer);
    std::string text = page == nullptr ? "" : page->content().abort.read();
    return text.empty() ? std::nullopt : std::optional(std::move(text));
}

void Mailbox::note_refusal(std::string_view text) {
    if (!speaks()) return;
    PageContent& content = page_of(rank_)->content();
    content.refused_ns.store(monotonic_ns(), std::memory_order_relaxed);
    content.refusal.write(text);
}

void Mailbox::withdraw_refusal() { note_refusal(""); }

std::optional<Refusal> Mailbox::refusal(int peer) const {
    const MailboxPage* page = page_of(peer);
    std::string text = page == nullptr ? "" : page->content().refusal.read();
    if (text.empty()) return std::nullopt;
    const uint64_t refused_ns = page->content().refused_ns.load(std::memory_order_relaxed);
    return Refusal{std::move(text), static_cast<double>(monotonic_ns() - refused_ns) * 1e-9};
}

}  // namespace deep_ep::comm
