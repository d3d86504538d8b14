//! M6: what Prometheus makes of `/metrics`, by its own parser.

use std::process::{Command, Stdio};

use mongo_core::bson::doc;
use mongo_monitor::{ClientWatch, METRICS};
use mongo_testkit::TestDeployment;

use crate::monitor::{until, watching};

/// Reads a text with Prometheus' Python client, which is installed into a folder of its own from PyPI, and prints the names and kinds of all families.
const PARSE: &str = "
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    series = set()
    for sample in family.samples:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        assert key not in series, key
        series.add(key)
    print(family.name, family.type, len(family.samples))
";

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_parser_of_prometheus_reads_every_family_as_it_was_meant() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let watch = ClientWatch::new();
    let mut options = server.client_options().await.unwrap();
    watch.attach(&mut options);
    let client = mongo_core::mongodb::Client::with_options(options).unwrap();
    client.database("shop").collection("odd \"name\"\\").insert_one(doc! { "n": 1 }).await.unwrap();
    let monitor = watching(&server).await;
    monitor.include(watch);
    let view = until(&monitor, "the set is complete", |view| {
        let lags = view.members.iter().flat_map(|member| &member.readings);
        lags.filter(|reading| reading.metric.name == "mongodb_replica_lag_seconds").count() == 2
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let packages = folder.path().join("packages");
    run(Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"])
        .arg(&packages)
        .arg("prometheus_client==0.22.1"));
    let text = folder.path().join("metrics.txt");
    std::fs::write(&text, view.to_open_metrics()).unwrap();
    let read = std::fs::File::open(&text).unwrap();
    let families = run(Command::new("python3").args(["-c", PARSE]).env("PYTHONPATH", &packages).stdin(Stdio::from(read)));
    let mut lines = families.lines();
    for metric in METRICS.iter().filter(|metric| view.members.iter().any(|member| member.readings_of(metric).next().is_some())) {
        let name = metric.name.trim_end_matches("_total").trim_end_matches("_info");
        let line = lines.find(|line| line.split(' ').next() == Some(name));
        let kind = line.and_then(|line| line.split(' ').nth(1)).map(str::to_owned);
        assert_eq!(kind, Some(metric.kind.to_string()), "{name}:\n{families}");
    }
    assert!(families.contains("db_client_operation_duration_seconds histogram"), "{families}");
    monitor.stop().await;
}
