#include "runtime/watcher.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <thread>

#include "support/world.h"

namespace deep_ep::test {
namespace {

// What this process writes to stderr while `work` runs.
std::string stderr_of(const std::function<void()>& work) {
    FILE* file = tmpfile();
    REQUIRE(file != nullptr);
    const int kept = dup(STDERR_FILENO);
    dup2(fileno(file), STDERR_FILENO);
    work();
    dup2(kept, STDERR_FILENO);
    close(kept);
    std::string text;
    std::rewind(file);
    for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) text += static_cast<char>(c);
    std::fclose(file);
    return text;
}

// Of two ranks, the first gives up in the middle of a call; the second makes none. True: it learns of it all the same.
bool is_told_without_calls() {
    World world(2, 1 << 16, {});
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 2};
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    world.buffer(1).start_watching();
    world.buffer(0).begin_call();
    world.launch_notify(problem, ranks[0], 0);
    world.buffer(0).abandon_call("dispatch: a reason");
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (world.buffer(1).failure().empty() && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // what is found is then written
    const bool is_told = world.buffer(1).failure().find("a reason") != std::string::npos;
    world.run();
    return is_told;
}

TEST_CASE("a rank that makes no call hears of a peer's failure, and stderr has the sentence once") {
    bool is_told = false;
    const std::string written = stderr_of([&] { is_told = is_told_without_calls(); });
    CHECK(is_told);
    const size_t at = written.find("a reason");
    REQUIRE_NE(at, std::string::npos);
    CHECK_EQ(written.find("a reason", at + 1), std::string::npos);
}

TEST_CASE("a forked child has a watcher of its own, and its parent keeps the one it had") {
    stderr_of([&] {
        CHECK(is_told_without_calls());
        const pid_t child = fork();
        REQUIRE_GE(child, 0);
        if (child == 0) _exit(is_told_without_calls() ? 0 : 1);
        int status = -1;
        REQUIRE_EQ(waitpid(child, &status, 0), child);
        CHECK_EQ(status, 0);
        CHECK(is_told_without_calls());
    });
}

TEST_CASE("Buffers come and go while they are watched") {
    for (int round = 0; round < 200; ++round) {
        World world(2, 1 << 12, {});
        for (int rank = 0; rank < 2; ++rank) world.buffer(rank).start_watching();
        if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(120));
    }
}

}  // namespace
}  // namespace deep_ep::test
