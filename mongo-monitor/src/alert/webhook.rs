//! Alerts to whoever takes them over HTTP.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Result, RetryBudget, RetryPolicy, Secret, bson::DateTime, lock::lock, retry,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{
    engine::{Alert, AlertPhase},
    sink::AlertSink,
};

/// Posts alerts as JSON, in the form of Prometheus' Alertmanager (its
/// [webhook, version 4](https://prometheus.io/docs/alerting/latest/configuration/#webhook_config)), which pagers and chats understand: what is new in a
/// round is one message.
///
/// Telling it takes no time: a task of its own sends, one message after another, and tries again what fails for want of an answer, or by an answer of 408, 429 or 5xx.
/// What is refused otherwise, or could not be sent for [`give_up_after`](WebhookSettings::give_up_after), is given up and said in the log as an error. If messages come faster than they
/// can be sent, the oldest of them are given up.
///
/// The address is a secret, as tokens stand in such: of it nothing but the host is ever printed.
///
/// ```no_run
/// # async fn f(settings: mongo_monitor::MonitorSettings) -> mongo_core::Result<()> {
/// use std::sync::Arc;
/// use mongo_monitor::{Alerts, WebhookSink, default_rules};
///
/// let webhook = Arc::new(WebhookSink::start("https://alerts.example/hook/s3cret", Default::default())?);
/// let alerts = Alerts::new(default_rules(&settings))?.with_sink(webhook.clone());
/// // … and before the process ends:
/// webhook.flush().await;
/// # Ok(()) }
/// ```
pub struct WebhookSink {
    host: String,
    outbox: Arc<Outbox>,
    stop: CancellationToken,
}

/// How a [`WebhookSink`] sends. Plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct WebhookSettings {
    /// How long one attempt may take. Default 10 s.
    pub timeout: Duration,
    /// For how long a message is tried again. Default 10 minutes.
    pub give_up_after: Duration,
    /// How many messages may wait. Default 256.
    pub waiting: usize,
    /// What each message names as its receiver. Default `mongo-monitor`.
    pub receiver: String,
    /// Labels that every alert gets besides its own, as the name of the deployment. Default none.
    pub labels: BTreeMap<String, String>,
}

impl Default for WebhookSettings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            give_up_after: Duration::from_secs(600),
            waiting: 256,
            receiver: "mongo-monitor".to_owned(),
            labels: BTreeMap::new(),
        }
    }
}

/// What is still to be sent.
#[derive(Debug)]
struct Outbox {
    settings: WebhookSettings,
    messages: Mutex<VecDeque<Vec<u8>>>,
    /// How many messages were told, and how many of them were sent or given up.
    told: watch::Sender<u64>,
    done: watch::Sender<u64>,
}

impl fmt::Debug for WebhookSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookSink").field("host", &self.host).finish_non_exhaustive()
    }
}

impl WebhookSink {
    /// Begins to send to an address, on the current tokio runtime.
    ///
    /// # Errors
    /// `InvalidInput` for what is no address of HTTP; `Internal` if no client can be made.
    pub fn start(url: impl Into<Secret>, settings: WebhookSettings) -> Result<Self> {
        let url: Secret = url.into();
        let wrong = || Error::invalid("a webhook's address is one of http or https, as https://alerts.example/hook");
        // The library's own error shows the address.
        let parsed = reqwest::Url::parse(url.expose()).map_err(|_| wrong())?;
        let host = parsed.host_str().filter(|_| matches!(parsed.scheme(), "http" | "https")).ok_or_else(wrong)?.to_owned();
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(mongo_core::tls::client_config()?)
            .timeout(settings.timeout)
            // One would make another request of it, and tell the address to somebody else.
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .build()
            .map_err(|error| Error::internal("no HTTP client can be made").with_source(error.without_url()))?;
        let outbox = Outbox { settings, messages: Mutex::default(), told: watch::Sender::new(0), done: watch::Sender::new(0) };
        let sink = Self { host, outbox: Arc::new(outbox), stop: CancellationToken::new() };
        tokio::spawn(Arc::clone(&sink.outbox).send_all(client, parsed, sink.host.clone(), sink.stop.clone()));
        Ok(sink)
    }

    /// Waits until all that was told so far has been sent or given up.
    ///
    /// # Cancel safety
    /// Dropping the future stops nothing.
    pub async fn flush(&self) {
        let told = *self.outbox.told.borrow();
        // The other end is ours, so it cannot be gone.
        let _ = self.outbox.done.subscribe().wait_for(|done| *done >= told).await;
    }
}

impl AlertSink for WebhookSink {
    fn tell(&self, news: &[Alert]) {
        match serde_json::to_vec(&Message::of(news, &self.outbox.settings)) {
            Ok(message) => self.outbox.add(message, &self.host),
            Err(error) => tracing::error!(%error, "alerts cannot be written as JSON"),
        }
    }
}

impl Drop for WebhookSink {
    /// What was not sent is given up: see [`flush`](WebhookSink::flush).
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Outbox {
    fn add(&self, message: Vec<u8>, host: &str) {
        let mut messages = lock(&self.messages);
        if messages.len() >= self.settings.waiting.max(1) {
            messages.pop_front();
            self.done.send_modify(|done| *done += 1);
            tracing::error!(host, "alerts come faster than they can be sent: the oldest were given up");
        }
        messages.push_back(message);
        drop(messages);
        self.told.send_modify(|told| *told += 1);
    }

    async fn send_all(self: Arc<Self>, client: reqwest::Client, url: reqwest::Url, host: String, stop: CancellationToken) {
        let mut told = self.told.subscribe();
        loop {
            let message = lock(&self.messages).pop_front();
            let Some(message) = message else {
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = told.changed() => if changed.is_err() { return },
                }
                continue;
            };
            let policy = RetryPolicy::default()
                .with_initial_delay(Duration::from_secs(1))
                .with_max_delay(Duration::from_secs(30))
                .with_max_attempts(u32::MAX)
                .with_deadline(self.settings.give_up_after);
            // Nobody else asks for this budget.
            let budget = RetryBudget::new(1.0, u32::MAX);
            let attempt = |_| send(&client, &url, message.clone());
            match retry(&policy, &budget, &stop, attempt).await {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Cancelled => {
                    tracing::error!(host, "alerts were not sent: their sink was dropped before");
                    return;
                }
                Err(error) => tracing::error!(host, error = %error.report(), "alerts could not be sent, and were given up"),
            }
            self.done.send_modify(|done| *done += 1);
        }
    }
}

async fn send(client: &reqwest::Client, url: &reqwest::Url, message: Vec<u8>) -> Result<()> {
    let request = client.post(url.clone()).header("content-type", "application/json").body(message);
    let answer = request.send().await.map_err(|error| {
        Error::new(ErrorKind::Unavailable, "the receiver of alerts does not answer").with_source(error.without_url())
    })?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let passes = status.is_server_error() || matches!(status.as_u16(), 408 | 429);
    let kind = if passes { ErrorKind::Unavailable } else { ErrorKind::InvalidInput };
    Err(Error::new(kind, "the receiver of alerts refuses them").with_context("status", status))
}

/// The form of Alertmanager.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Message<'a> {
    version: &'static str,
    group_key: &'static str,
    truncated_alerts: u32,
    status: &'static str,
    receiver: &'a str,
    group_labels: BTreeMap<&'a str, &'a str>,
    common_labels: &'a BTreeMap<String, String>,
    common_annotations: BTreeMap<&'a str, &'a str>,
    #[serde(rename = "externalURL")]
    external_url: &'static str,
    alerts: Vec<Told<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Told<'a> {
    status: &'static str,
    labels: BTreeMap<&'a str, &'a str>,
    annotations: BTreeMap<&'static str, String>,
    starts_at: String,
    ends_at: String,
    #[serde(rename = "generatorURL")]
    generator_url: &'static str,
    fingerprint: &'a str,
}

impl<'a> Message<'a> {
    fn of(news: &'a [Alert], settings: &'a WebhookSettings) -> Self {
        let alerts: Vec<Told<'a>> = news.iter().map(|alert| Told::of(alert, settings)).collect();
        let status = if alerts.iter().any(|alert| alert.status == FIRING) { FIRING } else { RESOLVED };
        Self {
            version: "4",
            group_key: "mongo-monitor",
            truncated_alerts: 0,
            status,
            receiver: &settings.receiver,
            group_labels: BTreeMap::new(),
            common_labels: &settings.labels,
            common_annotations: BTreeMap::new(),
            external_url: "",
            alerts,
        }
    }
}

impl<'a> Told<'a> {
    fn of(alert: &'a Alert, settings: &'a WebhookSettings) -> Self {
        let is_over = alert.phase == AlertPhase::Resolved;
        let mut labels: BTreeMap<&str, &str> =
            settings.labels.iter().chain(&alert.labels).map(|(name, value)| (&**name, &**value)).collect();
        labels.extend([("alertname", &*alert.rule), ("severity", alert.severity.name())]);
        labels.extend(alert.member.as_ref().map(|member| ("instance", &**member)));
        let mut annotations = BTreeMap::from([("summary", alert.summary.clone())]);
        annotations.extend(alert.value.map(|value| ("value", value.to_string())));
        let time = |at: DateTime| at.try_to_rfc3339_string().unwrap_or_default();
        Self {
            status: if is_over { RESOLVED } else { FIRING },
            labels,
            annotations,
            starts_at: time(alert.since),
            // What has not ended, ends in the year one.
            ends_at: alert.ended.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), time),
            generator_url: "",
            fingerprint: &alert.id,
        }
    }
}

const FIRING: &str = "firing";
const RESOLVED: &str = "resolved";
