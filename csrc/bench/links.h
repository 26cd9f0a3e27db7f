// The links between the ranks of a node, and nothing else of the library: what the operations are compared with.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/mailbox.h"
#include "comm/symmetric_heap.h"
#include "device/owned.h"

namespace deep_ep::bench {

// One rank's end. A region for each rank, mapped by all, as a Buffer has them.
class Links {
public:
    Links(std::shared_ptr<dev::Device> device, int rank, int num_ranks, int64_t bytes_per_peer,
          dev::Placement placement = dev::Placement::kDevice);

    std::string export_handle() const;
    // `handles[rank]` is this rank's own.
    void connect(const std::vector<std::string>& handles);
    // What is pushed from now on: bytes_per_peer bytes, on the host or the device. Zeros move faster on some machines.
    void load(const void* source);
    // `num_sms` SMs write bytes_per_peer to every peer at once. Null: a stream of its own.
    void push(int num_sms, dev::Stream stream);
    // Waits for what was pushed on the stream of its own.
    void synchronize();
    // When all ranks have done: nobody unmaps what a peer still writes to.
    void release(double timeout_s) noexcept { heap_.release(timeout_s); }

    // What the peer with that number has written.
    const uint8_t* part_from(int peer) const { return heap_.local() + peer * bytes_per_peer_; }

private:
    std::shared_ptr<dev::Device> device_;
    int rank_, num_ranks_;
    int64_t bytes_per_peer_;
    std::shared_ptr<comm::Mailbox> mailbox_;
    comm::SymmetricHeap heap_;
    dev::OwnedStream stream_;
};

}  // namespace deep_ep::bench
