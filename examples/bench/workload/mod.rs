//! What it costs to let an operation in, and what that is worth under load.

mod entry;
mod under_load;

use std::time::Duration;

use clap::{Args, ValueEnum};
use mongo_core::Result;
use mongo_examples::{Host, shop::Shop};
use serde::Serialize;

use self::{
    entry::{Entry, entries},
    under_load::{Goodput, Load, Protection, Share, Step},
};

#[derive(Args, Clone)]
pub(crate) struct EntrySettings {
    /// Operations that are let in, each time
    #[arg(long, value_name = "N", default_value_t = 300_000)]
    operations: u32,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// How long each is measured under load; 0 for only what it costs to let an operation in
    #[arg(long, value_name = "N", default_value_t = 8)]
    seconds: u64,
    /// Only this; may be given several times
    #[arg(long, value_name = "WHAT")]
    part: Vec<Part>,
    /// Orders in the shop
    #[arg(long, value_name = "N", default_value_t = 50_000)]
    documents: i64,
}

/// What is measured under load.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What the till feels of five times too many reports
    Protection,
    /// How near shares come to weights
    Shares,
    /// What is done in time at one half to three times what the server can do
    Goodput,
    /// How soon the slots suit a server that has become slower or faster
    Steps,
}

/// All that was measured.
#[derive(Serialize)]
pub(crate) struct Figures {
    entries: Vec<Entry>,
    protection: Vec<Protection>,
    shares: Vec<Share>,
    goodput: Vec<Goodput>,
    steps: Vec<Step>,
}

impl Figures {
    pub(crate) fn print(&self) {
        self.entries.iter().for_each(Entry::print);
        self.protection.iter().for_each(Protection::print);
        self.shares.iter().for_each(Share::print);
        self.goodput.iter().for_each(Goodput::print);
        self.steps.iter().for_each(Step::print);
    }
}

pub(crate) async fn figures(uri: Option<&str>, settings: &EntrySettings) -> Result<Figures> {
    let mut figures = Figures {
        entries: entries(settings).await?,
        protection: Vec::new(),
        shares: Vec::new(),
        goodput: Vec::new(),
        steps: Vec::new(),
    };
    if settings.seconds == 0 {
        return Ok(figures);
    }
    let host = match uri {
        Some(_) => Host::at(uri).await?,
        None => Host::embedded(1.0).await?,
    };
    eprintln!("{}", host.describe());
    let shop = Shop::open(&host.deployment, "mongo_bench", settings.documents).await?;
    let time = Duration::from_secs(settings.seconds);
    let load = Load { shop, uri: host.uri(uri), server: host.process_id(), time, runs: settings.runs.max(1) };
    let capacity = load.capacity().await;
    eprintln!("{capacity:.0} reports a second is what the server can do");
    let wanted = |part| settings.part.is_empty() || settings.part.contains(&part);
    if wanted(Part::Protection) {
        figures.protection = load.protection(capacity).await?;
    }
    if wanted(Part::Shares) {
        figures.shares = load.shares().await?;
    }
    if wanted(Part::Goodput) {
        figures.goodput = load.goodput(capacity).await?;
    }
    if wanted(Part::Steps) {
        figures.steps = load.steps().await?;
    }
    host.deployment.database("mongo_bench").drop().await?;
    Ok(figures)
}
