// The mailbox of a node: a page of host memory for each rank, which it alone writes and every peer reads.
//
// It lies outside the symmetric heap, on every kind of device, so that a rank can speak of the heap itself ("I have
// unmapped yours") and be heard when its device, its heap or its whole process is gone. What is said and when is in
// docs/protocols/failure.md.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/non_copyable.h"

namespace deep_ep::comm {

class MailboxPage;

enum class Presence {
    kHere,
    kLeft,  // has told so: it maps no memory of ours any more
    kGone,  // its process has ended without telling
};

struct Refusal {
    std::string text;
    double age_s;
};

// Any thread may read once connect() is over; one at a time may write. In a forked child it is silent: the rank is still
// the parent's.
class Mailbox : NonCopyable {
public:
    // Longer texts are cut.
    static constexpr size_t kMaxTextBytes = 1024;

    // Makes the page of this rank, whose process it stands for until it ends or the Mailbox goes.
    Mailbox(int rank, int num_ranks);
    ~Mailbox();

    int rank() const { return rank_; }
    // What peers need to read this rank's page: plain bytes.
    const std::string& handle() const { return handle_; }
    // Opens the page of every peer; `handles[rank]` is this rank's own. Once.
    void connect(const std::vector<std::string>& handles);

    // This rank maps no memory of its peers any more.
    void tell_left();
    // Before connect() everybody is here.
    Presence presence(int peer) const;

    // Why this rank makes no more calls. The first reason stays; false: there is one already.
    bool note_abort(std::string_view reason);
    std::optional<std::string> abort_note(int peer) const;

    // A call that this rank refused before any peer could know of it; the last one stands until it is withdrawn.
    void note_refusal(std::string_view text);
    void withdraw_refusal();
    std::optional<Refusal> refusal(int peer) const;

private:
    bool speaks() const;
    const MailboxPage* page_of(int peer) const;

    int rank_;
    std::vector<std::shared_ptr<MailboxPage>> pages_;  // by rank; null: not connected
    std::string handle_;
};

}  // namespace deep_ep::comm
