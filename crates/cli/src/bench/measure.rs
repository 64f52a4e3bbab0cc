//! What is measured: latencies of single operations, and the processor time and memory of the server's process.

use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};

/// Latencies in buckets of about 3 % width, so that millions of samples take little memory and percentiles stay exact enough.
#[derive(Clone)]
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

/// Sub-buckets per power of two.
const SUB: u64 = 32;

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { buckets: vec![0; 64 * SUB as usize], count: 0 }
    }

    pub(crate) fn add(&mut self, latency: Duration) {
        self.buckets[Self::bucket(latency.as_nanos() as u64)] += 1;
        self.count += 1;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The latency below which the share `q` of the samples lies, in milliseconds.
    pub(crate) fn percentile_ms(&self, q: f64) -> f64 {
        let wanted = (self.count as f64 * q).ceil() as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= wanted && *n > 0 {
                return Self::upper_nanos(i) as f64 / 1e6;
            }
        }
        0.0
    }

    fn bucket(nanos: u64) -> usize {
        if nanos < SUB {
            return nanos as usize;
        }
        let power = 63 - u64::from(nanos.leading_zeros());
        let step = power - SUB.ilog2() as u64;
        let sub = (nanos >> step) - SUB;
        (((step + 1) * SUB) + sub) as usize
    }

    fn upper_nanos(bucket: usize) -> u64 {
        let bucket = bucket as u64;
        if bucket < SUB {
            return bucket;
        }
        let step = bucket / SUB - 1;
        ((bucket % SUB) + SUB + 1) << step
    }
}

/// Processor seconds that a process has used, in user and kernel mode, all its threads.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // The second field is the program's name in parentheses and may hold spaces.
    let after = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

fn total_cpu_seconds(pids: &[u32]) -> Result<f64> {
    pids.iter().map(|pid| cpu_seconds(*pid)).sum()
}

/// Resident memory of a process in MiB.
pub(crate) fn rss_mib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib / 1024.0)
}

/// What one workload gave.
#[derive(Clone)]
pub(crate) struct Figures {
    pub(crate) latencies: Histogram,
    pub(crate) seconds: f64,
    /// Operations, which may be more than latencies (events delivered, keys read).
    pub(crate) operations: u64,
    pub(crate) server_cpu_seconds: Option<f64>,
    /// Operations of the luckiest and the unluckiest client.
    pub(crate) fairness: Option<(u64, u64)>,
    pub(crate) errors: u64,
}

impl Figures {
    pub(crate) fn rate(&self) -> f64 {
        self.operations as f64 / self.seconds
    }

    pub(crate) fn server_us_per_op(&self) -> Option<f64> {
        Some(self.server_cpu_seconds? * 1e6 / self.operations.max(1) as f64)
    }

    pub(crate) fn p(&self, q: f64) -> f64 {
        self.latencies.percentile_ms(q)
    }
}

/// A window of measuring: processor time of the server's processes from start to end.
pub(crate) struct Window {
    pids: Vec<u32>,
    started: Instant,
    cpu: f64,
}

impl Window {
    pub(crate) fn open(pids: &[u32]) -> Result<Self> {
        Ok(Self { pids: pids.to_vec(), started: Instant::now(), cpu: total_cpu_seconds(pids)? })
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) fn close(self, latencies: Histogram, operations: u64, errors: u64) -> Result<Figures> {
        let seconds = self.started.elapsed().as_secs_f64();
        let used = total_cpu_seconds(&self.pids)? - self.cpu;
        let server_cpu_seconds = (!self.pids.is_empty()).then_some(used);
        Ok(Figures { latencies, seconds, operations, server_cpu_seconds, fairness: None, errors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_bucket() {
        let mut h = Histogram::new();
        for us in 1..=1000 {
            h.add(Duration::from_micros(us));
        }
        for (q, expected) in [(0.5, 0.5), (0.99, 0.99), (1.0, 1.0)] {
            let got = h.percentile_ms(q);
            assert!((got - expected).abs() < expected * 0.04, "p{q}: {got} is not near {expected}");
        }
    }

    #[test]
    fn buckets_are_in_order_and_cover() {
        let mut last = 0;
        for nanos in (0..10_000_000_u64).step_by(997) {
            let b = Histogram::bucket(nanos);
            assert!(b >= last && Histogram::upper_nanos(b) >= nanos);
            last = b;
        }
    }
}
