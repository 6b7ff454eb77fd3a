/// Text in, text out as soon as it is certain that no stop string has begun. Texts are UTF-8.
struct TextStream {
    private let stops: [[UInt8]]
    private var held: [UInt8] = []
    private(set) var isStopped = false

    init(stopStrings: [String]) {
        stops = stopStrings.map { Array($0.utf8) }.filter { !$0.isEmpty }
    }

    /// The text that may be shown now.
    mutating func append(_ text: [UInt8]) -> String {
        held += text
        if let start = held.indices.first(where: { start in stops.contains { held[start...].starts(with: $0) } }) {
            isStopped = true
            return release(start, dropping: held.count - start)
        }
        return release(held.count - lengthOfPartialStop)
    }

    /// At the end of the text: what only looked like the start of a stop string.
    mutating func finish() -> String {
        release(held.count)
    }

    private mutating func release(_ count: Int, dropping dropped: Int = 0) -> String {
        let text = String(decoding: held.prefix(count), as: UTF8.self)
        held.removeFirst(count + dropped)
        return text
    }

    /// How many of the last bytes may become a stop string.
    private var lengthOfPartialStop: Int {
        let longest = min(held.count, (stops.map(\.count).max() ?? 0) - 1)
        guard longest > 0 else { return 0 }
        return (1...longest).last { length in stops.contains { $0.starts(with: held.suffix(length)) } } ?? 0
    }
}
