//! The daemon's log: stderr until the mount is ready, then the system log.
//!
//! In the foreground all messages go to stderr; if that is the journal, they go there with their fields
//! instead. The system log is the journal, elsewhere the socket `/dev/log` of syslog(3). Without both,
//! messages are dropped: neither may block or fail the daemon.

use std::io::{self, IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::journal::{self, Fields};

const SYSLOG: &str = "/dev/log";
/// Facility "daemon", as syslog(3) numbers it.
const FACILITY: u32 = 3 << 3;
/// Limit of messages per second: a program that reads a damaged disk in a loop must not fill the log.
const MAX_PER_SECOND: u32 = 20;
/// Longer messages are truncated: the socket would drop a datagram that is too long.
const MAX_LEN: usize = 2048;

/// The log of this process.
#[derive(Clone, Debug)]
pub(super) struct Log {
    /// Whether messages go to the system log instead of stderr.
    detached: Arc<AtomicBool>,
    /// Start of the current second, and the number of messages in it.
    counted: Arc<Mutex<(Instant, u32)>>,
    /// Fields of all records.
    about: Arc<Mutex<Fields>>,
    journal: Option<PathBuf>,
}

/// Starts the log; `verbose` lowers its level to debug.
pub(super) fn start(verbose: bool, as_child: bool) -> Log {
    let level = match (verbose, as_child) {
        (true, _) => LevelFilter::DEBUG,
        (false, false) => LevelFilter::INFO,
        (false, true) => LevelFilter::WARN,
    };
    let journal = journal::socket();
    let is_journal = !as_child && journal.is_some() && journal::is_stderr();
    let log = Log {
        detached: Arc::new(AtomicBool::new(is_journal)),
        counted: Arc::new(Mutex::new((Instant::now(), 0))),
        about: Arc::default(),
        journal,
    };
    // Colours only on a terminal.
    let colours =
        !as_child && io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let format = tracing_subscriber::fmt::layer().with_writer(log.clone()).with_target(false);
    // People read the message alone: it has what the fields have.
    let format = format.with_ansi(colours).fmt_fields(debug_fn(|out, field, value| {
        if field.name() == "message" { write!(out, "{value:?}") } else { Ok(()) }
    }));
    let format = format.with_filter(filter_fn(is_event));
    // Fails only if a subscriber is set already, which then serves as well.
    let _ = tracing_subscriber::registry().with(level).with(format).with(log.clone()).try_init();
    log
}

fn is_event(metadata: &Metadata<'_>) -> bool {
    metadata.is_event()
}

impl Log {
    /// Redirects later messages to the system log.
    pub(super) fn detach(&self) {
        self.detached.store(true, Ordering::Relaxed);
    }

    /// Adds fields to all later records.
    pub(super) fn about(&self, store: &Path, mount: &Path) {
        let mut fields = self.about.lock();
        fields.put("CHAINFS_STORE", store.as_os_str().as_encoded_bytes());
        fields.put("CHAINFS_MOUNT", mount.as_os_str().as_encoded_bytes());
    }

    /// Counts a message; whether it exceeds the limit of this second.
    fn is_flooded(&self) -> bool {
        let mut counted = self.counted.lock();
        if counted.0.elapsed() > Duration::from_secs(1) {
            *counted = (Instant::now(), 0);
        }
        counted.1 += 1;
        counted.1 > MAX_PER_SECOND
    }

    /// Writes a record to the system log.
    fn record(&self, level: Level, message: &str, fields: &[&[u8]]) {
        if let Some(socket) = &self.journal
            && journal::send(&journal::record(level, message, fields), socket)
        {
            return;
        }
        let priority = FACILITY | journal::severity(level);
        let mut text = format!("<{priority}>chainfs[{}]: {message}", std::process::id()).into_bytes();
        text.truncate(MAX_LEN);
        journal::send(&text, Path::new(SYSLOG));
    }
}

/// The writer of the layer for people.
impl<'a> MakeWriter<'a> for Log {
    type Writer = Box<dyn Write>;

    fn make_writer(&'a self) -> Self::Writer {
        if self.detached.load(Ordering::Relaxed) { Box::new(io::sink()) } else { Box::new(io::stderr()) }
    }
}

/// The layer for the system log.
impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if !self.detached.load(Ordering::Relaxed) || self.is_flooded() {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.bytes.extend_from_slice(&outer.bytes);
            }
        }
        let about = self.about.lock().bytes.clone();
        self.record(*event.metadata().level(), &fields.message, &[&fields.bytes, &about]);
    }
}
