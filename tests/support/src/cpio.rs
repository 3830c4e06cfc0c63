//! An archive as Linux unpacks it into its first file system (cpio, newc).

#[derive(Default)]
pub struct Archive(Vec<u8>);

impl Archive {
    /// Adds a file or a directory, whose `mode` says which it is. Directories come before what is in them.
    pub fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        let number = self.0.len();
        let (len, name_len) = (content.len(), name.len() + 1);
        let fields = [number, mode as usize, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0];
        self.0.extend_from_slice(b"070701");
        for field in fields {
            self.0.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend_from_slice(content);
        self.pad();
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, b"");
        self.0
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}
