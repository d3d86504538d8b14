//! The memory of the process, and the machine that it runs on.

use super::declare::{as_is, counter, gauge, kibibytes, labelled, machine, mebibytes, millis, scaled, worked_out};
use crate::metric::{Kind, Metric, Unit};

pub(super) const METRICS: &[Metric] = &[
    gauge(
        "mongodb_memory_bytes",
        "Memory of the process",
        Unit::Bytes,
        &["kind"],
        &[mebibytes("mem.resident", &["resident"]), mebibytes("mem.virtual", &["virtual"])],
    ),
    worked_out(
        "mongodb_host_memory_bytes",
        "Memory that the machine has, or that the container may use",
        Kind::Gauge,
        Unit::Bytes,
        &[],
        "hostInfo: system.memLimitMB, system.memSizeMB",
    ),
    worked_out("mongodb_host_cores", "Cores that the machine has", Kind::Gauge, Unit::None, &[], "hostInfo: system.numCores"),
    machine(
        "mongodb_host_cpu_seconds_total",
        "Processor time of the machine; Linux only, by the server's diagnostic data",
        Kind::Counter,
        Unit::Seconds,
        &["mode"],
        &[
            millis("systemMetrics.cpu.user_ms", &["user"]),
            millis("systemMetrics.cpu.nice_ms", &["nice"]),
            millis("systemMetrics.cpu.system_ms", &["system"]),
            millis("systemMetrics.cpu.idle_ms", &["idle"]),
            millis("systemMetrics.cpu.iowait_ms", &["iowait"]),
            millis("systemMetrics.cpu.irq_ms", &["irq"]),
            millis("systemMetrics.cpu.softirq_ms", &["softirq"]),
            millis("systemMetrics.cpu.steal_ms", &["steal"]),
        ],
    ),
    machine(
        "mongodb_host_available_memory_bytes",
        "Memory of the machine that is free or can be made so; Linux only, by the server's diagnostic data",
        Kind::Gauge,
        Unit::Bytes,
        &[],
        &[scaled("systemMetrics.memory.MemAvailable_kb", 1024.0)],
    ),
    machine(
        "mongodb_host_swap_bytes",
        "Swap space of the machine; Linux only, by the server's diagnostic data",
        Kind::Gauge,
        Unit::Bytes,
        &["kind"],
        &[kibibytes("systemMetrics.memory.SwapTotal_kb", &["total"]), kibibytes("systemMetrics.memory.SwapFree_kb", &["free"])],
    ),
    machine(
        "mongodb_host_disk_operations_total",
        "What the disks of the machine did; Linux only, by the server's diagnostic data",
        Kind::Counter,
        Unit::None,
        &["op", "device"],
        &[labelled("systemMetrics.disks.*.reads", &["read"]), labelled("systemMetrics.disks.*.writes", &["write"])],
    ),
    machine(
        "mongodb_host_disk_busy_seconds_total",
        "For how long the disks of the machine had something to do; Linux only, by the server's diagnostic data",
        Kind::Counter,
        Unit::Seconds,
        &["device"],
        &[scaled("systemMetrics.disks.*.io_time_ms", 1e-3)],
    ),
    counter(
        "mongodb_page_faults_total",
        "Pages that the process had to wait for from disk",
        Unit::None,
        &[],
        &[as_is("extra_info.page_faults")],
    ),
    gauge(
        "mongodb_allocator_bytes",
        "What the allocator holds",
        Unit::Bytes,
        &["kind"],
        &[
            labelled("tcmalloc.generic.heap_size", &["heap"]),
            labelled("tcmalloc.generic.current_allocated_bytes", &["allocated"]),
            labelled("tcmalloc.tcmalloc.pageheap_free_bytes", &["pageheap_free"]),
        ],
    ),
];
