//! The rules that come with the crate.
//!
//! Origins: the defaults and the guidance of MongoDB Atlas, the mixin of Grafana, those of the storage engine's own thresholds, and where these
//! are known to cry wolf, ours. Not taken over: shares of free tickets, which from 7.0 on say nothing, as the server
//! makes its pools larger and smaller by itself (how long is waited for them tells); the length of an oplog that is not full, which is short wherever a set is young;
//! restarts, which every upgrade is.

use super::rule::{Expression, Quantity, Rule, Severity, Threshold};
use crate::monitor::MonitorSettings;

/// The rules that a host gets if it does not say otherwise, for a monitor with these settings.
pub fn default_rules(settings: &MonitorSettings) -> Vec<Rule> {
    let q = |name: &str| Quantity::of(name);
    let rate = |name: &str| Quantity::of(name).rate_over(300);
    let cache = |kind: &str| vec![q("mongodb_cache_bytes").with("kind", kind)];
    let connections = |state: &str| q("mongodb_connections").with("state", state);
    let used =
        || Expression::Ratio { of: vec![connections("current")], to: vec![connections("current"), connections("available")] };
    let dirty = || Expression::Ratio { of: cache("dirty"), to: cache("max") };
    let full = || Expression::Ratio { of: cache("used"), to: cache("max") };
    let targeting = || Expression::Ratio {
        of: vec![rate("mongodb_query_scanned_keys_total"), rate("mongodb_query_scanned_objects_total")],
        to: vec![rate("mongodb_documents_total").with("op", "returned")],
    };
    let lag = || Expression::Each(q("mongodb_replica_lag_beyond_delay_seconds"));
    let queue = || Expression::Sum(vec![q("mongodb_global_lock_queue")]);
    let checkpoint = || Expression::Each(q("mongodb_checkpoint_duration_seconds").with("which", "recent"));
    let blind = || Expression::Each(q("mongodb_monitor_overdue_ratio"));
    let oldest = || Expression::Each(q("mongodb_currentop_oldest_seconds"));
    let full_oplog = || Expression::Each(q("mongodb_oplog_full_window_seconds"));
    let rejected = || {
        let limited = rate("mongodb_connection_establishment_rate_limit_total").with("result", "rejected");
        Expression::Sum(vec![rate("mongodb_connections_rejected_total"), limited])
    };
    let shed = || {
        let refused = rate("mongodb_ingress_admissions_total").with("limiter", "request").with("result", "rejected");
        Expression::Sum(vec![rate("mongodb_execution_load_shed_total"), refused])
    };
    let ticket_wait = || Expression::Ratio {
        of: vec![rate("mongodb_ticket_queue_seconds_total")],
        to: vec![rate("mongodb_ticket_processing_seconds_total")],
    };
    let latency = |class: &str| Expression::Ratio {
        of: vec![rate("mongodb_timed_operations_seconds_total").with("class", class)],
        to: vec![rate("mongodb_timed_operations_total").with("class", class)],
    };
    let disk = || {
        let bytes = |kind: &str| vec![q("mongodb_filesystem_bytes").with("kind", kind)];
        Expression::Ratio { of: bytes("used"), to: bytes("total") }
    };
    let cpu = |mode: &str| {
        let time = || Quantity::of("mongodb_host_cpu_seconds_total").rate_over(300);
        Expression::Ratio { of: vec![time().with("mode", mode)], to: vec![time()] }
    };
    let disk_operations = || Expression::Sum(vec![rate("mongodb_host_disk_operations_total")]);
    let swap = || Expression::Difference {
        of: q("mongodb_host_swap_bytes").with("kind", "total"),
        less: q("mongodb_host_swap_bytes").with("kind", "free"),
    };
    let certificate = || Expression::Each(q("mongodb_certificate_expiry_seconds"));
    vec![
        Make::warning("instance_down", Expression::Each(q("mongodb_up")), Threshold::Below(0.5), "a member does not answer: look at its process, host and network")
            .lasting(60)
            .unless(&["instance_down_long"])
        .rule,
        Make::critical("instance_down_long", Expression::Each(q("mongodb_up")), Threshold::Below(0.5), "a member has not answered for a quarter of an hour")
            .lasting(900)
            .rule,
        Make::critical(
            "no_primary",
            Expression::Total(q("mongodb_member_state").with("state", "PRIMARY")),
            Threshold::Below(0.5),
            "nobody takes writes: a majority of the members must be up and see each other",
        )
        .lasting(60)
        .rule,
        Make::critical(
            "cluster_health",
            Expression::Mean(q("mongodb_up")),
            Threshold::Below(0.8),
            "more than a fifth of the members do not answer",
        )
        .lasting(60)
        .rule,
        Make::warning(
            "member_unhealthy",
            Expression::Each(q("mongodb_replica_member_health")),
            Threshold::Below(0.5),
            "a member does not answer the heartbeats of another",
        )
        .lasting(60)
        .unless(&["instance_down", "instance_down_long", "cluster_health"])
        .rule,
        Make::warning("replication_lag", lag(), Threshold::Above(5.0), "a secondary is behind: reads from it are old, and a failover would take longer")
            .until(3.0)
            .lasting(60)
            .unless(&["replication_lag_long"])
        .rule,
        Make::critical("replication_lag_long", lag(), Threshold::Above(240.0), "a secondary is far behind: look at its disk, its cache and the network")
            .lasting(300)
            .rule,
        Make::critical(
            "replication_headroom",
            Expression::Each(q("mongodb_replication_headroom_seconds")),
            Threshold::Below(1.0),
            "a secondary is behind by as much as the oplog holds: it is about to need a copy of everything; make the oplog larger",
        )
        .lasting(300)
        .rule,
        Make::warning(
            "elections",
            Expression::Total(rate("mongodb_elections_total").with("result", "called")),
            Threshold::Above(0.01),
            "more than three elections in five minutes: look at the network between the members",
        )
        .rule,
        Make::warning("connections", used(), Threshold::Above(0.8), "most of the connections that the server allows are taken: look at the pools of clients")
            .until(0.75)
            .lasting(120)
            .unless(&["connections_exhausted"])
        .rule,
        Make::critical("connections_exhausted", used(), Threshold::Above(0.95), "hardly any connection is left").lasting(60).rule,
        Make::warning("queued_operations", queue(), Threshold::Above(10.0), "operations wait for each other: look for slow ones").lasting(120).unless(&["queued_operations_many"])
        .rule,
        Make::critical("queued_operations_many", queue(), Threshold::Above(100.0), "a hundred operations wait for each other").lasting(120).rule,
        Make::warning(
            "ticket_queue",
            Expression::Sum(vec![q("mongodb_ticket_queue_length")]),
            Threshold::Above(10.0),
            "operations wait to be let into the storage engine",
        )
        .lasting(120)
        .rule,
        Make::warning("cache_dirty", dirty(), Threshold::Above(0.05), "writes come faster than they reach the disk").until(0.04).lasting(300).unless(&["cache_dirty_stalling"])
        .rule,
        Make::critical("cache_dirty_stalling", dirty(), Threshold::Above(0.2), "operations have to write pages out themselves: the disk is too slow")
            .lasting(120)
            .rule,
        Make::warning("cache_full", full(), Threshold::Above(0.85), "the cache is fuller than the storage engine wants it").until(0.82).lasting(600).unless(&["cache_full_stalling"])
        .rule,
        Make::critical("cache_full_stalling", full(), Threshold::Above(0.95), "operations have to make room in the cache themselves").lasting(300).rule,
        Make::warning(
            "eviction_by_operations",
            Expression::Sum(vec![rate("mongodb_cache_app_eviction_seconds_total")]),
            Threshold::Above(0.01),
            "operations spend time on evicting pages: the cache is too small, or the disk too slow",
        )
        .lasting(300)
        .rule,
        Make::warning("checkpoint", checkpoint(), Threshold::Above(60.0), "a checkpoint takes longer than the minute after which the next is due").lasting(300).unless(&["checkpoint_long"])
        .rule,
        Make::critical("checkpoint_long", checkpoint(), Threshold::Above(300.0), "checkpoints take minutes: a restart would take as long").lasting(300).rule,
        Make::warning("query_targeting", targeting(), Threshold::Above(1000.0), "queries look at a thousand keys and documents for each that they return: an index is missing")
            .lasting(600)
            .unless(&["query_targeting_bad"])
        .rule,
        Make::critical("query_targeting_bad", targeting(), Threshold::Above(8000.0), "queries look at thousands of documents for each that they return").lasting(600).rule,
        Make::warning("page_faults", Expression::Sum(vec![rate("mongodb_page_faults_total")]), Threshold::Above(50.0), "the process waits for its memory: it is too little")
            .lasting(300)
            .rule,
        Make::warning(
            "cursors_open",
            Expression::Each(q("mongodb_cursors_open").with("kind", "total")),
            Threshold::Above(10_000.0),
            "many cursors are open: somebody does not read them to their end",
        )
        .lasting(120)
        .rule,
        Make::warning(
            "cursors_timed_out",
            Expression::Sum(vec![rate("mongodb_cursors_timed_out_total")]),
            Threshold::Above(100.0 / 60.0),
            "cursors are forgotten by their clients",
        )
        .lasting(120)
        .rule,
        Make::warning("oplog_window", full_oplog(), Threshold::Below(86_400.0), "the oplog holds less than a day: who is away for as long needs a copy of everything")
            .until(90_000.0)
            .lasting(300)
            .unless(&["oplog_window_short"])
            .rule,
        Make::critical("oplog_window_short", full_oplog(), Threshold::Below(3600.0), "the oplog holds less than an hour: make it larger").lasting(600).rule,
        Make::warning(
            "primary_elected",
            Expression::Sum(vec![rate("mongodb_elections_total").with("result", "successful")]),
            Threshold::Above(0.0),
            "another member has become primary",
        )
        .rule,
        Make::warning("connections_rejected", rejected(), Threshold::Above(0.0), "the server refuses connections").lasting(120).rule,
        Make::warning("load_shed", shed(), Threshold::Above(0.0), "the server refuses requests because there are too many").lasting(60).rule,
        Make::warning("ticket_wait", ticket_wait(), Threshold::Above(0.2), "operations wait for the storage engine for a fifth of the time that they work")
            .lasting(120)
            .unless(&["ticket_wait_long"])
            .rule,
        Make::critical("ticket_wait_long", ticket_wait(), Threshold::Above(1.0), "operations wait for the storage engine for longer than they work").lasting(120).rule,
        Make::warning("read_latency", latency("reads"), Threshold::Above(0.02), "reads take longer than 20 ms on the average")
            .until(0.015)
            .lasting(300)
            .unless(&["read_latency_high"])
            .rule,
        Make::critical("read_latency_high", latency("reads"), Threshold::Above(0.05), "reads take longer than 50 ms on the average").until(0.04).lasting(300).rule,
        Make::warning("write_latency", latency("writes"), Threshold::Above(0.02), "writes take longer than 20 ms on the average")
            .until(0.015)
            .lasting(300)
            .unless(&["write_latency_high"])
            .rule,
        Make::critical("write_latency_high", latency("writes"), Threshold::Above(0.05), "writes take longer than 50 ms on the average").until(0.04).lasting(300).rule,
        Make::warning(
            "memory",
            Expression::Ratio { of: vec![q("mongodb_memory_bytes").with("kind", "resident")], to: vec![q("mongodb_host_memory_bytes")] },
            Threshold::Above(0.8),
            "the process has most of the machine's memory",
        )
        .until(0.75)
        .lasting(300)
        .rule,
        Make::warning("cpu", cpu("user"), Threshold::Above(0.75), "the machine works at three quarters of what it can").until(0.7).lasting(300).unless(&["cpu_full"]).rule,
        Make::critical("cpu_full", cpu("user"), Threshold::Above(0.95), "the machine has no processor time left").until(0.9).lasting(300).rule,
        Make::warning("cpu_stolen", cpu("steal"), Threshold::Above(0.05), "the machine does not get the processor time that it wants from its host").lasting(300).unless(&["cpu_stolen_much"]).rule,
        Make::critical("cpu_stolen_much", cpu("steal"), Threshold::Above(0.2), "a fifth of the machine's processor time goes to others").lasting(300).rule,
        Make::warning("disk_operations", disk_operations(), Threshold::Above(4000.0), "the disks do more than four thousand operations a second: look whether they can")
            .lasting(120)
            .unless(&["disk_operations_many"])
            .rule,
        Make::critical("disk_operations_many", disk_operations(), Threshold::Above(9000.0), "the disks do more than nine thousand operations a second").lasting(300).rule,
        Make::warning("swap", swap(), Threshold::Above(2e9), "the machine has swapped two gigabytes out: its memory is too little").lasting(900).rule,
        Make::warning("disk", disk(), Threshold::Above(0.9), "the disk is filling up").until(0.88).unless(&["disk_full"]).rule,
        Make::critical("disk_full", disk(), Threshold::Above(0.95), "the disk is almost full: the server ends when it is").lasting(300).rule,
        Make::warning(
            "namespaces",
            Expression::Each(q("mongodb_namespaces").with("kind", "collection")),
            Threshold::Above(10_000.0),
            "there are more than ten thousand collections: restarts and failovers take long",
        )
        .rule,
        Make::warning("certificate", certificate(), Threshold::Below(30.0 * 86_400.0), "the server's certificate is valid for less than a month")
            .lasting(3600)
            .unless(&["certificate_soon"])
            .rule,
        Make::critical("certificate_soon", certificate(), Threshold::Below(7.0 * 86_400.0), "the server's certificate is valid for less than a week").lasting(3600).rule,
        Make::warning(
            "flow_control",
            Expression::Each(q("mongodb_flow_control_lagged")),
            Threshold::Above(0.5),
            "writes are slowed because a majority of the members lags",
        )
        .lasting(300)
        .rule,
        Make::warning(
            "slow_operation",
            oldest(),
            Threshold::Above(settings.slow_operation.as_secs_f64()),
            "an operation has been under way for long: the monitor shows which",
        )
        .unless(&["long_operation", "endless_operation"])
        .rule,
        Make::warning("long_operation", oldest(), Threshold::Above(300.0), "an operation has been under way for five minutes")
            .lasting(60)
            .unless(&["endless_operation"])
            .rule,
        Make::critical("endless_operation", oldest(), Threshold::Above(1800.0), "an operation has been under way for half an hour")
            .lasting(60)
            .rule,
        // So that what is not known is never taken for being well.
        Make::warning("monitor_blind", blind(), Threshold::Above(1.0), "what is shown of a member is old: it cannot be read")
            .lasting(60)
            .unless(&["instance_down", "instance_down_long", "monitor_blind_long"])
            .rule,
        Make::critical("monitor_blind_long", blind(), Threshold::Above(3.0), "a member has not been readable for long")
            .unless(&["instance_down", "instance_down_long"])
            .rule,
    ]
}

/// A rule in the making.
struct Make {
    rule: Rule,
}

impl Make {
    fn warning(name: &str, expression: Expression, threshold: Threshold, summary: &str) -> Self {
        Self { rule: Rule::new(name, Severity::Warning, expression, threshold, summary) }
    }

    fn critical(name: &str, expression: Expression, threshold: Threshold, summary: &str) -> Self {
        Self { rule: Rule::new(name, Severity::Critical, expression, threshold, summary) }
    }

    fn lasting(mut self, seconds: u64) -> Self {
        self.rule.for_seconds = seconds;
        self
    }

    fn until(mut self, clear: f64) -> Self {
        self.rule.clear = Some(clear);
        self
    }

    fn unless(mut self, others: &[&str]) -> Self {
        self.rule.inhibited_by = others.iter().map(|name| (*name).to_owned()).collect();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alert::Expression;

    /// To write it anew: `UPDATE_DOCS=1 cargo test -p mongo-monitor`.
    #[test]
    fn the_documentation_is_that_of_the_rules() {
        let quantity = |of: &Quantity| {
            let labels: Vec<String> = of.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(", ")) };
            let name = format!("`{}{labels}`", of.metric);
            of.rate_over_seconds.map_or_else(|| name.clone(), |seconds| format!("rate of {name} over {seconds} s"))
        };
        let sum = |of: &[Quantity]| of.iter().map(quantity).collect::<Vec<_>>().join(" + ");
        let mut page = "# The rules that come with the crate\n\nMade from `default_rules` with the default settings.\n\n\
            | name | severity | looks at | alarming | well again | for | what to do | not told while |\n|---|---|---|---|---|---|---|---|\n"
            .to_owned();
        for rule in default_rules(&MonitorSettings::default()) {
            let looks_at = match &rule.expression {
                Expression::Each(of) => quantity(of),
                Expression::Sum(of) => sum(of),
                Expression::Ratio { of, to } => format!("({}) / ({})", sum(of), sum(to)),
                Expression::Difference { of, less } => format!("{} - {}", quantity(of), quantity(less)),
                Expression::Total(of) => format!("{}, summed over all members", quantity(of)),
                Expression::Mean(of) => format!("{}, mean of all members", quantity(of)),
            };
            let clear = rule.clear.map(|clear| clear.to_string()).unwrap_or_default();
            let lasting = if rule.for_seconds == 0 { "at once".to_owned() } else { format!("{} s", rule.for_seconds) };
            let unless = rule.inhibited_by.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            page.push_str(&format!(
                "| `{}` | {} | {looks_at} | {} | {clear} | {lasting} | {} | {unless} |\n",
                rule.name, rule.severity, rule.threshold, rule.summary
            ));
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/alerts.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        assert!(
            std::fs::read_to_string(path).unwrap_or_default() == page,
            "docs/alerts.md is not that of the rules: write it anew"
        );
    }
}
