//! What a run did, as lines that are hashed and, when asked for, shown.

/// A hash of everything that a run did: equal for equal seeds, or the run is not deterministic.
pub struct Trace {
    hash: u64,
    lines: u64,
    shown: bool,
}

impl Trace {
    pub fn new(shown: bool) -> Self {
        // FNV-1a: two runs of one seed are compared, nobody attacks it.
        Self { hash: 0xcbf2_9ce4_8422_2325, lines: 0, shown }
    }

    pub fn say(&mut self, line: impl FnOnce() -> String) {
        let line = line();
        if self.shown {
            println!("{line}");
        }
        self.bytes(line.as_bytes());
        self.lines += 1;
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Facts of an event that is too frequent for a line of its own.
    pub fn numbers(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.hash = (self.hash ^ number).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn lines(&self) -> u64 {
        self.lines
    }
}
