//! M9: the dashboard's page, in a real browser, on a real replica set.
//!
//! Needs Debian's packages `chromium` and `chromium-driver`, which speak the protocol of [WebDriver](https://www.w3.org/TR/webdriver2/).

use std::{
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use mongo_core::bson::{Document, doc};
use mongo_monitor::{Alerts, Expression, Quantity, Rule, Severity, Threshold};
use mongo_testkit::TestDeployment;
use serde_json::{Value, json};

use crate::monitor::watching;

/// A browser that is steered.
struct Browser {
    driver: Child,
    session: String,
    http: reqwest::Client,
}

impl Browser {
    /// Begins with a window as wide and high as this, light or dark.
    async fn open(width: u32, height: u32, scheme: &str) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new("chromedriver");
        command.arg(format!("--port={port}")).stdout(Stdio::null()).stderr(Stdio::null());
        let driver = command.spawn().expect("install Debian's packages chromium and chromium-driver");
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(mongo_core::tls::client_config().unwrap())
            .timeout(Duration::from_secs(60))
            .build()
            .unwrap();
        let base = format!("http://127.0.0.1:{port}/session");
        let dark = u32::from(scheme == "light");
        let options = json!({
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", format!("--window-size={width},{height}"),
                format!("--blink-settings=preferredColorScheme={dark}")],
            // A headless window is never narrower than 500 pixels, a telephone is.
            "mobileEmulation": { "deviceMetrics": { "width": width, "height": height, "pixelRatio": 1.0, "touch": false, "mobile": false } },
        });
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let opened = async {
            loop {
                // Until it listens.
                if let Ok(answer) = http.post(&base).body(capabilities.to_string()).send().await {
                    break serde_json::from_str::<Value>(&answer.text().await.unwrap()).unwrap();
                }
                tokio::task::yield_now().await;
            }
        };
        let answer = tokio::time::timeout(Duration::from_secs(60), opened).await.expect("the browser's driver does not listen");
        let id = answer["value"]["sessionId"].as_str().unwrap_or_else(|| panic!("{answer:#}"));
        Self { driver, session: format!("{base}/{id}"), http }
    }

    async fn ask(&self, what: &str, body: Value) -> Value {
        let request = match body {
            Value::Null => self.http.get(format!("{}/{what}", self.session)),
            body => self.http.post(format!("{}/{what}", self.session)).body(body.to_string()),
        };
        let text = request.send().await.unwrap().text().await.unwrap();
        let mut answer: Value = serde_json::from_str(&text).unwrap();
        assert!(answer["value"].get("error").is_none(), "{what}: {answer:#}");
        answer["value"].take()
    }

    /// What a script on the page returns.
    async fn run(&self, script: &str) -> Value {
        self.ask("execute/sync", json!({ "script": format!("return ({script});"), "args": [] })).await
    }

    /// Asks again and again until something is so on the page.
    async fn until(&self, what: &str) {
        let looking = async { while self.run(what).await != Value::Bool(true) {} };
        if tokio::time::timeout(Duration::from_secs(60), looking).await.is_err() {
            panic!("never so on the page: {what}\n{}", self.run("document.body.innerText").await);
        }
    }

    async fn press(&self, keys: &[&str]) {
        let actions: Vec<Value> =
            keys.iter().flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({ "type": kind, "value": key }))).collect();
        self.ask("actions", json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": actions }] })).await;
    }

    /// Keeps a picture where `SCREENSHOTS` says, as for the README.
    async fn picture(&self, name: &str) {
        let Some(folder) = std::env::var_os("SCREENSHOTS") else { return };
        let encoded = self.ask("screenshot", Value::Null).await;
        let mut decoder = Command::new("base64").arg("-d").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(decoder.stdin.as_mut().unwrap(), encoded.as_str().unwrap().as_bytes()).unwrap();
        let picture = decoder.wait_with_output().unwrap().stdout;
        std::fs::write(std::path::Path::new(&folder).join(format!("{name}.png")), picture).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Takes its browser along.
        let _ = Command::new("curl").args(["--silent", "--max-time", "10", "-X", "DELETE", &self.session]).output();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// Lines on a chart that have a course.
fn drawn(chart: &str) -> String {
    format!("document.querySelectorAll('[data-chart=\"{chart}\"] svg path[d*=\"L\"]').length >= 3")
}

const TAB: &str = "\u{e004}";
const LEFT: &str = "\u{e012}";
const ENTER: &str = "\u{e007}";

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_a_set_at_every_width_and_follows_it_through_a_failure() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let monitor = Arc::new(watching(&server).await);
    let up = Expression::Each(Quantity::of("mongodb_up"));
    monitor.alert(Alerts::new(vec![Rule::new("down", Severity::Critical, up, Threshold::Below(0.5), "look at it")]).unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let page = format!("http://{}/mongo/dashboard", listener.local_addr().unwrap());
    let app = axum::Router::new().nest("/mongo", mongo_monitor::router(Arc::clone(&monitor)));
    let serving = tokio::spawn(async move { axum::serve(listener, app).await });
    let orders = server.client().await.unwrap().database("shop").collection::<Document>("orders");
    let working = tokio::spawn(async move {
        loop {
            // While there is no primary it fails.
            let _ = orders.insert_one(doc! { "n": 1 }).await;
            let _ = orders.find_one(doc! {}).await;
        }
    });
    let primary = server.primary().await.unwrap();
    for (name, width, height, scheme) in [
        ("light", 1280, 1500, "light"),
        ("dark", 1280, 1500, "dark"),
        ("narrow", 360, 2400, "dark"),
        ("wall", 3840, 2160, "dark"),
    ] {
        let browser = Browser::open(width, height, scheme).await;
        browser.ask("url", json!({ "url": page })).await;
        browser.until("document.body.dataset.state === 'live'").await;
        browser.until("document.querySelector('#health').dataset.health === 'healthy'").await;
        browser.until("document.querySelectorAll('[data-host][data-member-state=PRIMARY]').length === 1").await;
        browser.until("document.querySelectorAll('[data-host][data-member-state=SECONDARY]').length === 2").await;
        for chart in ["operations", "latency", "connections", "cache", "network", "memory"] {
            browser.until(&drawn(chart)).await;
        }
        browser.until("document.querySelectorAll('[data-chart=\"lag\"] svg').length > 0").await;
        let fits = "document.documentElement.scrollWidth <= innerWidth";
        assert_eq!(browser.run(fits).await, true, "{name}");
        let background =
            browser.run("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3).every(c => c < 64)").await;
        assert_eq!(background, scheme == "dark", "{name}");
        browser.picture(name).await;
        // Nothing was refused, loaded from elsewhere, or threw.
        let log = browser.ask("se/log", json!({ "type": "browser" })).await;
        assert_eq!(log, json!([]), "{name}");
        let elsewhere = "performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith(location.origin + '/mongo/')).map(entry => entry.name)";
        assert_eq!(browser.run(elsewhere).await, json!([]), "{name}");
    }

    let browser = Browser::open(1280, 1500, "light").await;
    browser.ask("url", json!({ "url": format!("{page}?range=300") })).await;
    browser.until("document.body.dataset.state === 'live'").await;
    // With the keyboard alone: to the pause button, and to a chart whose readout follows the arrows.
    for _ in 0..10 {
        if browser.run("document.activeElement.id").await == "pause" {
            break;
        }
        browser.press(&[TAB]).await;
    }
    browser.press(&[ENTER]).await;
    browser.until("document.body.dataset.state === 'paused'").await;
    browser.press(&[ENTER]).await;
    browser.until("document.body.dataset.state === 'live'").await;
    browser.until(&drawn("operations")).await;
    let reached = "document.activeElement.closest('[data-chart]') !== null";
    for _ in 0..40 {
        if browser.run(reached).await == true {
            break;
        }
        browser.press(&[TAB]).await;
    }
    assert_eq!(browser.run(reached).await, true, "a chart can be reached with the keyboard");
    browser.press(&[LEFT, LEFT, LEFT]).await;
    browser.until("(document.activeElement.getAttribute('aria-valuetext') ?? '').length > 0").await;

    // A member dies: the page says so, shows no numbers for it, tells the failover, and is well again afterwards.
    let host = server.member(primary).host_port();
    server.member(primary).kill().unwrap();
    browser.until("document.querySelector('#health').dataset.health === 'degraded'").await;
    browser.until(&format!("document.querySelector('[data-host=\"{host}\"]').dataset.memberState === 'DOWN'")).await;
    browser.until("document.querySelectorAll('[data-alert][data-tone=bad]').length === 1").await;
    browser.until("document.querySelectorAll('[data-event=new_primary]').length >= 1").await;
    let row = browser.run(&format!("document.querySelector('[data-host=\"{host}\"]').innerText")).await;
    assert!(!row.as_str().unwrap().contains("NaN") && row.as_str().unwrap().contains('–'), "{row}");
    browser.picture("failure").await;
    server.member(primary).restart().await.unwrap();
    browser.until("document.querySelector('#health').dataset.health === 'healthy'").await;
    // The monitor itself goes away: what is shown is no longer shown as if it were so.
    serving.abort();
    browser.until("['failed', 'stale'].includes(document.body.dataset.state)").await;
    assert_eq!(browser.run("document.querySelector('#health').dataset.health").await, "unknown");
    working.abort();
}
