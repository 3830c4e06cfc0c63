//! How the last command of a chain is doing.

/// Where a command stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JobState {
    /// None has been given since the mount.
    #[default]
    Idle,
    /// It is at work.
    Running,
    /// It is done.
    Done,
    /// It was refused or has failed.
    Failed,
    /// The user has stopped it.
    Cancelled,
}

impl JobState {
    /// The word of `control/status`.
    pub fn name(self) -> &'static str {
        match self {
            JobState::Idle => "idle",
            JobState::Running => "running",
            JobState::Done => "done",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more is going to happen.
    pub fn is_over(self) -> bool {
        self != JobState::Running
    }
}

/// What `control/status` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The command's number; 0 before the first.
    pub number: u64,
    /// Its words.
    pub command: String,
    /// Where it stands.
    pub state: JobState,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Why it was refused or has failed.
    pub error: Option<String>,
    /// What is to be known of it besides.
    pub notes: Vec<String>,
    /// Different whenever anything else is.
    pub version: u64,
}
