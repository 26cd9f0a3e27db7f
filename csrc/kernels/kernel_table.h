// The operations of one back end. The runtime picks a table by device; nothing else knows that there are two.
#pragma once

#include "device/compiler.h"

namespace deep_ep::kernels {

struct LayoutParams;
struct NotifyDispatchParams;
struct DispatchParams;
struct CombineParams;
struct InternodeNotifyParams;
struct InternodeDispatchParams;
struct InternodeCombineParams;
struct LowLatencyDispatchParams;
struct LowLatencyCombineParams;
struct LowLatencyCall;

// All are asynchronous, in stream order.
struct KernelTable {
    void (*layout)(const LayoutParams& params, int num_blocks, dev::Stream stream);
    void (*notify_dispatch)(const NotifyDispatchParams& params, dev::Stream stream);
    void (*dispatch)(const DispatchParams& params, dev::Stream stream);
    void (*combine)(const CombineParams& params, dev::Stream stream);
    // Across nodes, over the engine that this table was compiled for.
    void (*internode_notify)(const InternodeNotifyParams& params, dev::Stream stream);
    void (*internode_dispatch)(const InternodeDispatchParams& params, dev::Stream stream);
    void (*internode_combine)(const InternodeCombineParams& params, dev::Stream stream);
    void (*low_latency_dispatch)(const LowLatencyDispatchParams& params, dev::Stream stream);
    void (*low_latency_combine)(const LowLatencyCombineParams& params, dev::Stream stream);
    void (*low_latency_clean)(const LowLatencyCall& call, dev::Stream stream);
    // The same across nodes.
    void (*internode_low_latency_dispatch)(const LowLatencyDispatchParams& params, dev::Stream stream);
    void (*internode_low_latency_combine)(const LowLatencyCombineParams& params, dev::Stream stream);
    void (*internode_low_latency_clean)(const LowLatencyCall& call, dev::Stream stream);
};

const KernelTable& simt_kernel_table();
const KernelTable& cuda_kernel_table();  // only where EP_WITH_CUDA

// What the table of this back end names; each stands at the end of its operation's file.
inline namespace EP_BACKEND {
void launch(const LayoutParams& params, int num_blocks, dev::Stream stream);
void launch(const NotifyDispatchParams& params, dev::Stream stream);
void launch(const DispatchParams& params, dev::Stream stream);
void launch(const CombineParams& params, dev::Stream stream);
void launch(const InternodeNotifyParams& params, dev::Stream stream);
void launch(const InternodeDispatchParams& params, dev::Stream stream);
void launch(const InternodeCombineParams& params, dev::Stream stream);
void launch(const LowLatencyDispatchParams& params, dev::Stream stream);
void launch(const LowLatencyCombineParams& params, dev::Stream stream);
void launch(const LowLatencyCall& call, dev::Stream stream);
}  // namespace EP_BACKEND

#if !defined(EP_ACROSS_NODES)
namespace EP_NODES_BACKEND {
void launch(const LowLatencyDispatchParams& params, dev::Stream stream);
void launch(const LowLatencyCombineParams& params, dev::Stream stream);
void launch(const LowLatencyCall& call, dev::Stream stream);
}  // namespace EP_NODES_BACKEND
#endif

}  // namespace deep_ep::kernels
