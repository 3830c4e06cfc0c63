//! The status of a chain's last command.

/// The state of a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JobState {
    /// No command since the mount.
    #[default]
    Idle,
    /// It is running.
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

    /// Whether the state is final.
    pub fn is_over(self) -> bool {
        self != JobState::Running
    }
}

/// The content of `control/status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The command's number; 0 before the first.
    pub number: u64,
    /// Its words.
    pub command: String,
    /// Its state.
    pub state: JobState,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Why it was refused or has failed.
    pub error: Option<String>,
    /// Further notes.
    pub notes: Vec<String>,
    /// Changes whenever another field does.
    pub version: u64,
}
