//! A table for a person: a line for each member, and below it what could not be read.

use std::{fmt::Write as _, time::Duration};

use mongo_examples::human_bytes;
use mongo_monitor::{Alert, AlertPhase, MemberView, Monitor};

/// The table; rates are those of the newest while of a length, and left out for none.
pub(crate) fn of(monitor: &Monitor, rates_over: Duration) -> String {
    let view = monitor.view();
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(view.members.iter().map(|member| row(monitor, member, rates_over)));
    let width = |column: usize| rows.iter().map(|row| row.get(column).map_or(0, |cell| cell.chars().count())).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        for (position, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right.
            let _ = if position < 2 { write!(text, "{cell:width$}  ") } else { write!(text, "{cell:>width$}  ") };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    for member in &view.members {
        for slow in &member.slow_operations {
            let plan = slow.plan.as_deref().unwrap_or("no plan yet");
            let application = slow.application.as_deref().unwrap_or("somebody");
            let _ = writeln!(
                text,
                "{}: {:.0} s: {} {} of {application}, {plan}, opid {}: {}",
                member.host, slow.running_seconds, slow.op, slow.namespace, slow.opid, slow.command
            );
        }
        for collector in &member.collectors {
            if let Some(failure) = &collector.failure {
                let _ = writeln!(text, "{}: {}: {failure}", member.host, collector.name);
            }
        }
    }
    text
}

/// What fires, and what is about to, a line each.
pub(crate) fn of_alerts(alerts: &[Alert]) -> String {
    let mut text = String::new();
    for alert in alerts.iter().filter(|alert| alert.muted.is_none()) {
        let state = match alert.phase {
            AlertPhase::Firing => "FIRING  ",
            AlertPhase::Resolved => "resolved",
            _ => "pending ",
        };
        let value = alert.value.map(|value| format!(", {value:.2}")).unwrap_or_default();
        let _ = writeln!(text, "{state}  {}  {}{value}: {}", alert.severity, alert.id, alert.summary);
    }
    text
}

fn row(monitor: &Monitor, member: &MemberView, rates_over: Duration) -> [String; 12] {
    let number = |name: &str, labels: &[&str]| member.number(name, labels);
    let text = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"));
    let rate = |labels: &[&str]| {
        let summary = monitor.summary(&member.host, "mongodb_operations_total", labels, rates_over);
        text(summary.and_then(|summary| summary.rate))
    };
    let state = if member.is_up() { member.state().unwrap_or("-") } else { "down" };
    let cache = number("mongodb_cache_bytes", &["used"]).zip(number("mongodb_cache_bytes", &["max"]));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes for a person")]
    let memory = number("mongodb_memory_bytes", &["resident"]).map_or_else(|| "-".to_owned(), |bytes| human_bytes(bytes as u64));
    let lag = monitor.view().members.iter().find_map(|other| other.number("mongodb_replica_lag_seconds", &[&member.host]));
    [
        member.host.clone(),
        state.to_owned(),
        rate(&["query"]),
        rate(&["insert"]),
        rate(&["update"]),
        rate(&["delete"]),
        rate(&["command"]),
        text(number("mongodb_connections", &["current"])),
        cache.map_or_else(|| "-".to_owned(), |(used, max)| format!("{:.0} %", used / max * 100.0)),
        memory,
        lag.map_or_else(|| "-".to_owned(), |lag| format!("{lag:.0} s")),
        number("mongodb_oplog_window_seconds", &[]).map_or_else(|| "-".to_owned(), |window| format!("{:.1} h", window / 3600.0)),
    ]
}

const HEAD: [&str; 12] = [
    "member",
    "state",
    "query/s",
    "insert/s",
    "update/s",
    "delete/s",
    "command/s",
    "connections",
    "cache",
    "memory",
    "lag",
    "oplog",
];
