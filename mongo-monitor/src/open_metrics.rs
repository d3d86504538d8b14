//! The text format of Prometheus and OpenMetrics 1.0.

use std::fmt::{self, Write as _};

use crate::{
    METRICS,
    metric::{Kind, Metric},
    monitor::View,
    reading::{HistogramValue, Reading, Value},
};

/// The type under which the text is served.
pub const OPEN_METRICS_CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

impl View {
    /// Everything in the text format that Prometheus scrapes, [`OPEN_METRICS_CONTENT_TYPE`]. Each sample has the label `server`, the member that it was
    /// read of, or that a client has to do with.
    pub fn to_open_metrics(&self) -> String {
        let mut text = String::new();
        for metric in METRICS {
            let of_servers =
                self.members.iter().flat_map(|member| member.readings_of(metric).map(|reading| (Some(&*member.host), reading)));
            let of_client = self.client.iter().filter(|reading| reading.metric == metric).map(|reading| (None, reading));
            let mut readings = of_servers.chain(of_client).peekable();
            if readings.peek().is_none() {
                continue;
            }
            // Writing to a string does not fail.
            let _ = describe(&mut text, metric);
            for (server, reading) in readings {
                let _ = write_reading(&mut text, server, reading);
            }
        }
        text.push_str("# EOF\n");
        text
    }
}

/// The name without what the kind adds to it.
fn family(metric: &Metric) -> &'static str {
    let ending = match metric.kind {
        Kind::Counter => "_total",
        Kind::Info => "_info",
        _ => "",
    };
    metric.name.strip_suffix(ending).unwrap_or(metric.name)
}

fn describe(text: &mut String, metric: &Metric) -> fmt::Result {
    let family = family(metric);
    writeln!(text, "# TYPE {family} {}", metric.kind)?;
    if let Some(unit) = metric.unit.suffix() {
        writeln!(text, "# UNIT {family} {unit}")?;
    }
    writeln!(text, "# HELP {family} {}", Escaped(metric.help))
}

fn write_reading(text: &mut String, server: Option<&str>, reading: &Reading) -> fmt::Result {
    match &reading.value {
        Value::Number(number) => {
            text.push_str(reading.metric.name);
            write_labels(text, server, reading, None)?;
            writeln!(text, " {}", Number(*number))
        }
        Value::Histogram(HistogramValue { buckets, count, sum }) => {
            let name = reading.metric.name;
            for (bound, below) in buckets.iter().copied().chain([(f64::INFINITY, *count)]) {
                write!(text, "{name}_bucket")?;
                write_labels(text, server, reading, Some(bound))?;
                writeln!(text, " {below}")?;
            }
            write!(text, "{name}_count")?;
            write_labels(text, server, reading, None)?;
            write!(text, " {count}\n{name}_sum")?;
            write_labels(text, server, reading, None)?;
            writeln!(text, " {}", Number(*sum))
        }
    }
}

fn write_labels(text: &mut String, server: Option<&str>, reading: &Reading, bound: Option<f64>) -> fmt::Result {
    let mut separator = '{';
    let mut write_label = |name: &str, value: &dyn fmt::Display| {
        let written = write!(text, "{separator}{name}=\"{value}\"");
        separator = ',';
        written
    };
    if let Some(server) = server {
        write_label("server", &Escaped(server))?;
    }
    for (name, value) in reading.metric.labels.iter().zip(&reading.labels) {
        // The label that holds the state of a state set is named as the set.
        let is_state = reading.metric.kind == Kind::StateSet && *name == "state";
        write_label(if is_state { reading.metric.name } else { name }, &Escaped(value))?;
    }
    if let Some(bound) = bound {
        write_label("le", &Number(bound))?;
    }
    if separator == ',' {
        text.push('}');
    }
    Ok(())
}

struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| match character {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            other => f.write_char(other),
        })
    }
}

struct Number(f64);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            number if number == f64::INFINITY => f.write_str("+Inf"),
            number if number == f64::NEG_INFINITY => f.write_str("-Inf"),
            number if number.is_nan() => f.write_str("NaN"),
            // Both kinds of readers know `1.0` for a bound.
            number => write!(f, "{number:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use mongo_core::bson::DateTime;

    use super::*;
    use crate::{monitor::MemberView, table::metric};

    #[test]
    fn every_kind_is_written_as_the_format_asks() {
        let reading = |name: &str, labels: &[&str], value: Value| Reading {
            metric: metric(name).unwrap(),
            labels: labels.iter().map(|label| (*label).to_owned()).collect(),
            value,
        };
        let readings = vec![
            reading("mongodb_up", &[], Value::Number(1.0)),
            reading("mongodb_instance_info", &["6.0.5", "wiredTiger", "mongod", "a\"b\\\n"], Value::Number(1.0)),
            reading("mongodb_member_state", &["PRIMARY"], Value::Number(1.0)),
            reading("mongodb_network_bytes_total", &["in"], Value::Number(3e20)),
            reading(
                "mongodb_operation_duration_seconds",
                &["reads"],
                Value::Histogram(HistogramValue { buckets: vec![(0.000_128, 1), (1.048_576, 3)], count: 4, sum: 7.5 }),
            ),
        ];
        let members = vec![MemberView {
            host: "a:1".to_owned(),
            takes_writes: false,
            collectors: Vec::new(),
            readings,
            slow_operations: Vec::new(),
        }];
        let text = View { at: DateTime::from_millis(0), members, client: Vec::new() }.to_open_metrics();
        let expected = r#"# TYPE mongodb_up gauge
# HELP mongodb_up Whether the member answered a ping within its deadline
mongodb_up{server="a:1"} 1.0
# TYPE mongodb_instance info
# HELP mongodb_instance What the member is
mongodb_instance_info{server="a:1",version="6.0.5",storage_engine="wiredTiger",process="mongod",set="a\"b\\\n"} 1.0
# TYPE mongodb_member_state stateset
# HELP mongodb_member_state What the member is doing in its replica set
mongodb_member_state{server="a:1",mongodb_member_state="PRIMARY"} 1.0
# TYPE mongodb_network_bytes counter
# UNIT mongodb_network_bytes bytes
# HELP mongodb_network_bytes Bytes of messages, before compression
mongodb_network_bytes_total{server="a:1",direction="in"} 3e20
# TYPE mongodb_operation_duration_seconds histogram
# UNIT mongodb_operation_duration_seconds seconds
# HELP mongodb_operation_duration_seconds How long operations took in the server; read less often than the rest
mongodb_operation_duration_seconds_bucket{server="a:1",class="reads",le="0.000128"} 1
mongodb_operation_duration_seconds_bucket{server="a:1",class="reads",le="1.048576"} 3
mongodb_operation_duration_seconds_bucket{server="a:1",class="reads",le="+Inf"} 4
mongodb_operation_duration_seconds_count{server="a:1",class="reads"} 4
mongodb_operation_duration_seconds_sum{server="a:1",class="reads"} 7.5
# EOF
"#;
        assert_eq!(text, expected);
    }
}
