//! M5: alerts over HTTP, to a receiver that fails, refuses, and is away.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Json, Router, http::StatusCode, routing::post};
use mongo_monitor::{Alerts, Expression, Quantity, Rule, Severity, Threshold, WebhookSettings, WebhookSink};
use mongo_testkit::TestDeployment;
use serde_json::Value;

use crate::monitor::{told, until, watching};

/// A receiver that answers by a list of statuses, and with 200 from then on.
struct Receiver {
    url: String,
    messages: Arc<Mutex<Vec<Value>>>,
    asked: Arc<AtomicUsize>,
}

async fn receiver(statuses: &'static [u16]) -> Receiver {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook/s3cret", listener.local_addr().unwrap());
    let (messages, asked) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
    let (kept, count) = (Arc::clone(&messages), Arc::clone(&asked));
    let take = async move |Json(message): Json<Value>| {
        let status = statuses.get(count.fetch_add(1, Ordering::SeqCst)).copied().unwrap_or(200);
        if status == 200 {
            kept.lock().unwrap().push(message);
        }
        StatusCode::from_u16(status).unwrap()
    };
    let app = Router::new().route("/hook/s3cret", post(take));
    tokio::spawn(async move { axum::serve(listener, app).await });
    Receiver { url, messages, asked }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_dies_and_comes_back_is_told_also_when_the_receiver_fails_at_first() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let monitor = watching(&server).await;
    until(&monitor, "three members are up", |view| view.members.iter().filter(|member| member.is_up()).count() == 3).await;
    let receiver = receiver(&[500, 429]).await;
    let mut settings = WebhookSettings::default();
    settings.labels.insert("deployment".to_owned(), "shop".to_owned());
    let webhook = Arc::new(WebhookSink::start(receiver.url.clone(), settings).unwrap());
    let up = Expression::Each(Quantity::of("mongodb_up"));
    let rule = Rule::new("down", Severity::Critical, up, Threshold::Below(0.5), "look at it");
    let mut alerts = Alerts::new(vec![rule]).unwrap().with_sink(Arc::<WebhookSink>::clone(&webhook));
    let index = (server.primary().await.unwrap() + 1) % 3;
    let host = server.member(index).host_port();
    server.member(index).kill().unwrap();
    told(&mut alerts, &monitor).await;
    webhook.flush().await;
    server.member(index).restart().await.unwrap();
    told(&mut alerts, &monitor).await;
    webhook.flush().await;
    let messages = receiver.messages.lock().unwrap().clone();
    let statuses: Vec<&str> = messages.iter().map(|message| message["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["firing", "resolved"]);
    assert_eq!(receiver.asked.load(Ordering::SeqCst), 4);
    let alert = &messages[0]["alerts"][0];
    let labels = serde_json::json!({ "alertname": "down", "severity": "critical", "instance": host, "deployment": "shop" });
    assert_eq!((&alert["labels"], &alert["annotations"]["summary"]), (&labels, &Value::from("look at it")));
    assert_eq!(alert["endsAt"], "0001-01-01T00:00:00Z");
    assert_eq!(messages[1]["alerts"][0]["fingerprint"], alert["fingerprint"]);
    assert_ne!(messages[1]["alerts"][0]["endsAt"], "0001-01-01T00:00:00Z");
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_for_good_is_given_up_and_the_next_is_sent() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let monitor = watching(&server).await;
    let receiver = receiver(&[404]).await;
    let webhook = Arc::new(WebhookSink::start(receiver.url.clone(), WebhookSettings::default()).unwrap());
    assert!(!format!("{webhook:?}").contains("s3cret"));
    let rule = |name: &str| {
        let up = Expression::Each(Quantity::of("mongodb_up"));
        Rule::new(name, Severity::Warning, up, Threshold::Above(0.5), "it is up")
    };
    for name in ["first", "second"] {
        let mut alerts = Alerts::new(vec![rule(name)]).unwrap().with_sink(Arc::<WebhookSink>::clone(&webhook));
        told(&mut alerts, &monitor).await;
    }
    webhook.flush().await;
    let messages = receiver.messages.lock().unwrap().clone();
    let names: Vec<&Value> = messages.iter().map(|message| &message["alerts"][0]["labels"]["alertname"]).collect();
    assert_eq!(names, ["second"]);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_away_holds_up_nobody() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let monitor = watching(&server).await;
    let mut settings = WebhookSettings::default();
    settings.give_up_after = Duration::ZERO;
    settings.timeout = Duration::from_secs(1);
    // Takes connections, and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let webhook = WebhookSink::start(format!("http://{}/", silent.local_addr().unwrap()), settings).unwrap();
    let webhook = Arc::new(webhook);
    let up = Expression::Each(Quantity::of("mongodb_up"));
    let rule = Rule::new("up", Severity::Warning, up, Threshold::Above(0.5), "it is up");
    let mut alerts = Alerts::new(vec![rule]).unwrap().with_sink(Arc::<WebhookSink>::clone(&webhook));
    told(&mut alerts, &monitor).await;
    // Given up after its time, so that whoever ends does not wait for ever.
    tokio::time::timeout(Duration::from_secs(60), webhook.flush()).await.unwrap();
    monitor.stop().await;
}

#[tokio::test]
async fn what_is_no_address_is_refused_without_being_printed() {
    for url in ["ftp://alerts.example/s3cret", "not an address s3cret", ""] {
        let error = WebhookSink::start(url, WebhookSettings::default()).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("s3cret"), "{error}");
    }
}
