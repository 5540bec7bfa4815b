//! TCP proxy that makes a loopback connection behave like a network: a fixed delay each way and a line of
//! limited rate, shared by all connections and both directions.
//!
//! Threads and blocking sockets, not tasks: a thread's sleep is exact to a tenth of a millisecond, where a
//! runtime's timer rounds to whole ones, and a sleeping thread costs nothing. Each direction has a reader, which
//! stamps what it reads with the time it is due, and a writer, which waits for that time. Only data is delayed:
//! the TCP handshake is not.

#![deny(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use clap::Parser;
use hypernbd_bench_tools::line::Line;
use parking_lot::{Mutex, MutexGuard};

/// Largest piece read at once: the share of the line one connection gets before the next has its turn.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces under way in one direction of one connection. Bounds memory when a receiver stops reading, and is far
/// above what a line of 1 GB/s holds in 100 ms.
const PIECES_UNDER_WAY: usize = 4096;
/// How far the line may be booked ahead. Short, so that a small request does not wait behind other connections'
/// bulk; long enough that a late wake-up does not leave the line idle.
const BOOKED_AHEAD_MAX: Duration = Duration::from_millis(2);
/// Where booking goes on after a wait. Well below the limit, so that a full line is not one wait a piece.
const BOOKED_AHEAD_MIN: Duration = Duration::from_micros(500);
const STACK_BYTES: usize = 128 * 1024;

/// Adds a fixed delay each way to TCP connections and caps the line.
#[derive(Parser)]
struct Args {
    /// Address to listen on; port 0 takes a free one. The address is printed.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where connections go.
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// Delay each way, in milliseconds.
    #[arg(long, default_value_t = 10.0)]
    delay_ms: f64,
    /// Rate of the line in all, in 1,000,000 bytes per second; 0 leaves it open.
    #[arg(long, default_value_t = 250)]
    line_mb_per_s: u64,
}

/// A piece of the stream, or its end (`None`), and when it arrives.
type Piece = (Instant, Option<Bytes>);

fn main() -> Result<()> {
    let args = Args::parse();
    let delay = Duration::try_from_secs_f64(args.delay_ms / 1e3).context("--delay-ms: not a delay")?;
    let rate = (args.line_mb_per_s > 0).then_some(args.line_mb_per_s * 1_000_000);
    let line = Arc::new(Mutex::new(Line::new(Instant::now(), delay, rate)));
    let listener = TcpListener::bind(args.listen).with_context(|| format!("--listen {}", args.listen))?;
    println!("{}", listener.local_addr()?);
    loop {
        match listener.accept() {
            Ok((client, peer)) => {
                if let Err(error) = connect(client, &args.to, &line) {
                    eprintln!("delay-proxy: connection from {peer}: {error:#}");
                }
            }
            Err(error) => {
                eprintln!("delay-proxy: accept: {error}");
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Connects `client` to `to` and starts the four threads that carry the bytes.
fn connect(client: TcpStream, to: &str, line: &Arc<Mutex<Line>>) -> Result<()> {
    let server = TcpStream::connect(to).with_context(|| format!("--to {to}"))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    carry(client.try_clone()?, server.try_clone()?, line.clone())?;
    carry(server, client, line.clone())
}

/// Starts the two threads that carry one direction.
fn carry(from: TcpStream, to: TcpStream, line: Arc<Mutex<Line>>) -> Result<()> {
    let (sender, receiver) = sync_channel(PIECES_UNDER_WAY);
    let thread = || thread::Builder::new().stack_size(STACK_BYTES);
    thread().spawn(move || read_pieces(from, &sender, &line))?;
    thread().spawn(move || write_pieces(&receiver, to))?;
    Ok(())
}

/// Reads until the stream ends or breaks, or until the writer has gone.
fn read_pieces(mut from: TcpStream, sender: &SyncSender<Piece>, line: &Mutex<Line>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.resize(PIECE_BYTES, 0);
        let len = match from.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Ok(len) => len,
            Err(_) => 0,
        };
        let due_at = book(line, len);
        let piece = (len > 0).then(|| buffer.split_to(len).freeze());
        if sender.send((due_at, piece)).is_err() || len == 0 {
            return;
        }
    }
}

/// Books the line for `len` bytes and waits where it is booked too far ahead, first come first served. Returns
/// when the bytes arrive.
fn book(line: &Mutex<Line>, len: usize) -> Instant {
    let mut line = line.lock();
    let now = Instant::now();
    let passage = line.send(now, len);
    let booked_ahead = passage.sent_at.saturating_duration_since(now);
    if booked_ahead > BOOKED_AHEAD_MAX {
        thread::sleep(booked_ahead - BOOKED_AHEAD_MIN);
    }
    MutexGuard::unlock_fair(line);
    passage.due_at
}

/// Writes each piece when it is due; ends the stream where the reader saw its end.
fn write_pieces(receiver: &Receiver<Piece>, mut to: TcpStream) {
    for (due_at, piece) in receiver {
        sleep_until(due_at);
        match piece {
            Some(piece) => {
                if to.write_all(&piece).is_err() {
                    // Nobody takes the bytes any more: wake the reader of the other direction too.
                    let _ = to.shutdown(Shutdown::Both);
                    return;
                }
            }
            None => {
                let _ = to.shutdown(Shutdown::Write);
            }
        }
    }
}

fn sleep_until(time: Instant) {
    let wait = time.saturating_duration_since(Instant::now());
    if !wait.is_zero() {
        thread::sleep(wait);
    }
}
