//! Progress for a person: a bar on a terminal, lines elsewhere.

use std::{io::IsTerminal as _, sync::Mutex, time::Duration};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use mongo_core::{
    clock::{Clock as _, SystemClock},
    lock::lock,
    progress::{ProgressEvent, ProgressSink, Total},
};

/// Draws progress on standard error.
#[derive(Debug)]
pub struct TerminalProgress {
    clock: SystemClock,
    terminal: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bar: Option<ProgressBar>,
    last_line: Duration,
}

impl TerminalProgress {
    /// A bar if standard error is a terminal, else a line every two seconds.
    pub fn new() -> Self {
        Self { clock: SystemClock::new(), terminal: std::io::stderr().is_terminal(), state: Mutex::default() }
    }
}

impl Default for TerminalProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl ProgressSink for TerminalProgress {
    fn event(&self, event: &ProgressEvent) {
        let mut state = lock(&self.state);
        match event {
            ProgressEvent::PhaseStarted { phase, total, .. } if self.terminal => {
                let bytes = match total {
                    Total::Estimate { bytes, .. } | Total::Exact { bytes, .. } => *bytes,
                    _ => 0,
                };
                let bar = if bytes > 0 { ProgressBar::new(bytes) } else { ProgressBar::new_spinner() };
                let template = "{prefix:8} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
                if bytes > 0
                    && let Ok(style) = ProgressStyle::with_template(template)
                {
                    bar.set_style(style);
                }
                bar.set_prefix(*phase);
                state.bar = Some(bar);
            }
            ProgressEvent::Advanced { bytes, .. } if self.terminal => {
                if let Some(bar) = &state.bar {
                    // Estimates can be too low.
                    if bar.length().is_some_and(|length| *bytes > length) {
                        bar.set_length(*bytes);
                    }
                    bar.set_position(*bytes);
                }
            }
            ProgressEvent::PhaseFinished { phase, documents, bytes, .. } => {
                if let Some(bar) = state.bar.take() {
                    bar.finish_and_clear();
                }
                eprintln!("{phase}: {documents} done, {}", human_bytes(*bytes));
            }
            ProgressEvent::Advanced { phase, documents, bytes, .. } => {
                let now = self.clock.monotonic();
                if now.saturating_sub(state.last_line) >= LINE_EVERY {
                    state.last_line = now;
                    eprintln!("{phase}: {documents} so far, {}", human_bytes(*bytes));
                }
            }
            ProgressEvent::Note(note) => match &state.bar {
                Some(bar) => bar.println(note),
                None => eprintln!("{note}"),
            },
            _ => {}
        }
    }
}

/// A number of bytes with a fitting unit.
pub fn human_bytes(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

const LINE_EVERY: Duration = Duration::from_secs(2);
