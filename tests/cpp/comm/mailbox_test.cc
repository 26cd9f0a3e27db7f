#include "comm/mailbox.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "core/error.h"

namespace deep_ep::comm {
namespace {

// Ranks in one process; a mailbox may be null.
struct Node {
    explicit Node(int num_ranks) {
        std::vector<std::string> handles;
        for (int rank = 0; rank < num_ranks; ++rank) {
            boxes.push_back(std::make_unique<Mailbox>(rank, num_ranks));
            handles.push_back(boxes.back()->handle());
        }
        for (auto& box : boxes) box->connect(handles);
    }
    std::vector<std::unique_ptr<Mailbox>> boxes;
};

// A peer in a process of its own: rank 1 of 2, which does `work` and then ends without a word. `meanwhile` runs when the
// two are connected; the peer waits for its end.
void with_other_process(const std::function<void(Mailbox&)>& work, const std::function<void(Mailbox&)>& meanwhile,
                        const std::function<void(Mailbox&)>& afterwards) {
    int to_child[2], to_parent[2];
    REQUIRE_EQ(pipe(to_child), 0);
    REQUIRE_EQ(pipe(to_parent), 0);
    Mailbox mine(0, 2);
    const pid_t child = fork();
    REQUIRE_GE(child, 0);
    std::string theirs(mine.handle().size(), '\0');
    char ready = 1;
    if (child == 0) {
        Mailbox box(1, 2);
        static_cast<void>(!write(to_parent[1], box.handle().data(), box.handle().size()));
        box.connect({mine.handle(), box.handle()});
        work(box);
        static_cast<void>(!write(to_parent[1], &ready, 1));
        static_cast<void>(!read(to_child[0], &ready, 1));
        _exit(0);
    }
    REQUIRE_EQ(read(to_parent[0], theirs.data(), theirs.size()), static_cast<ssize_t>(theirs.size()));
    mine.connect({mine.handle(), theirs});
    REQUIRE_EQ(read(to_parent[0], &ready, 1), 1);
    meanwhile(mine);
    REQUIRE_EQ(write(to_child[1], &ready, 1), 1);
    // Not waited for yet: a process that has ended and whose parent has not looked counts as gone too.
    siginfo_t info{};
    REQUIRE_EQ(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
    afterwards(mine);
    REQUIRE_EQ(waitpid(child, nullptr, 0), child);
    afterwards(mine);
    for (int fd : {to_child[0], to_child[1], to_parent[0], to_parent[1]}) close(fd);
}

size_t count_names() {
    size_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/dev/shm"))
        count += entry.path().filename().string().starts_with("deep_ep-") ? 1 : 0;
    return count;
}

TEST_CASE("every rank hears what one says, and nobody else said it") {
    Node node(3);
    node.boxes[1]->tell_left();
    CHECK(node.boxes[2]->note_abort("out of memory"));
    node.boxes[0]->note_refusal("x must be a tensor");
    for (const auto& box : node.boxes) {
        CHECK_EQ(box->presence(0), Presence::kHere);
        CHECK_EQ(box->presence(1), Presence::kLeft);
        CHECK_EQ(box->presence(2), Presence::kHere);
        CHECK_FALSE(box->abort_note(0).has_value());
        CHECK_FALSE(box->abort_note(1).has_value());
        CHECK_EQ(box->abort_note(2), "out of memory");
        CHECK_EQ(box->refusal(0)->text, "x must be a tensor");
        CHECK_GE(box->refusal(0)->age_s, 0.0);
        CHECK_FALSE(box->refusal(1).has_value());
    }
}

TEST_CASE("the first reason to abort stays, the last refusal counts until it is withdrawn, and long texts are cut") {
    Node node(2);
    CHECK(node.boxes[0]->note_abort("first"));
    CHECK_FALSE(node.boxes[0]->note_abort("second"));
    CHECK_EQ(node.boxes[1]->abort_note(0), "first");
    node.boxes[0]->note_refusal(std::string(5000, 'a'));
    CHECK_EQ(node.boxes[1]->refusal(0)->text, std::string(Mailbox::kMaxTextBytes, 'a'));
    node.boxes[0]->note_refusal("short");
    CHECK_EQ(node.boxes[1]->refusal(0)->text, "short");
    node.boxes[0]->withdraw_refusal();
    CHECK_FALSE(node.boxes[1]->refusal(0).has_value());
}

TEST_CASE("before the peers are known, everybody is here and nothing was said") {
    Mailbox box(0, 2);
    CHECK_EQ(box.presence(1), Presence::kHere);
    CHECK_FALSE(box.abort_note(1).has_value());
    CHECK_FALSE(box.refusal(1).has_value());
}

TEST_CASE("a text is read whole or not at all while it changes") {
    Node node(2);
    std::atomic<bool> is_over{false};
    std::thread writer([&] {
        for (int i = 0; i < 20000; ++i) {
            const char letter = static_cast<char>('a' + i % 26);
            node.boxes[0]->note_refusal(std::string(static_cast<size_t>(1 + i % 900), letter));
        }
        is_over = true;
    });
    while (!is_over) {
        const auto refusal = node.boxes[1]->refusal(0);
        if (refusal.has_value()) CHECK_EQ(refusal->text, std::string(refusal->text.size(), refusal->text[0]));
    }
    writer.join();
}

TEST_CASE("a rank whose process has ended is gone, and what it said remains") {
    with_other_process([](Mailbox& box) { box.note_abort("last words"); },
                       [](Mailbox& box) { CHECK_EQ(box.presence(1), Presence::kHere); },
                       [](Mailbox& box) {
                           CHECK_EQ(box.presence(1), Presence::kGone);
                           CHECK_EQ(box.abort_note(1), "last words");
                       });
}

TEST_CASE("a rank that has left has left, whether its process ends or not") {
    const auto has_left = [](Mailbox& box) { CHECK_EQ(box.presence(1), Presence::kLeft); };
    with_other_process([](Mailbox& box) { box.tell_left(); }, has_left, has_left);
}

TEST_CASE("children of a rank do not keep it alive, and do not speak for it") {
    with_other_process(
        [](Mailbox& box) {
            if (fork() == 0) {
                box.tell_left();
                box.note_abort("not mine to say");
                sleep(3);
                _exit(0);
            }
        },
        [](Mailbox& box) {
            CHECK_EQ(box.presence(1), Presence::kHere);
            CHECK_FALSE(box.abort_note(1).has_value());
        },
        [](Mailbox& box) { CHECK_EQ(box.presence(1), Presence::kGone); });
}

TEST_CASE("several Buffers of one process do not take each other's life sign away") {
    with_other_process(
        [](Mailbox&) {
            Node other(2);  // opens, and closes, pages of its own process
        },
        [](Mailbox& box) { CHECK_EQ(box.presence(1), Presence::kHere); },
        [](Mailbox& box) { CHECK_EQ(box.presence(1), Presence::kGone); });
}

TEST_CASE("no name is left behind once all have connected, or the mailbox has gone") {
    const size_t before = count_names();
    {
        Node node(3);
        CHECK_EQ(count_names(), before);
        const Mailbox alone(0, 1), unread(0, 2);
        CHECK_EQ(count_names(), before + 1);
    }
    CHECK_EQ(count_names(), before);
}

TEST_CASE("a handle that is none, or leads nowhere, is refused") {
    Mailbox box(0, 2);
    CHECK_THROWS_AS(box.connect({box.handle()}), InternalError);
    CHECK_THROWS_WITH_AS(box.connect({box.handle(), "nonsense"}), doctest::Contains("not a handle of a mailbox"),
                         TransportError);
    std::string handle = Mailbox(1, 2).handle();
    CHECK_THROWS_WITH_AS(box.connect({box.handle(), handle}), doctest::Contains("cannot reach the mailbox of rank 1"),
                         TransportError);
}

}  // namespace
}  // namespace deep_ep::comm
