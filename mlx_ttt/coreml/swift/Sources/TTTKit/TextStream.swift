/// Bytes of tokens in, text out as soon as it is certain: never half a character, never a part of a stop string.
struct TextStream {
    private let stops: [[UInt8]]
    private var held: [UInt8]
    private(set) var isStopped = false

    /// - Parameter partialCharacter: the start of a character that the first bytes may complete.
    init(stopStrings: [String], partialCharacter: [UInt8] = []) {
        stops = stopStrings.map { Array($0.utf8) }.filter { !$0.isEmpty }
        held = partialCharacter
    }

    /// The start of a character whose other bytes have not come.
    var partialCharacter: [UInt8] {
        Array(held.suffix(lengthOfPartialCharacter))
    }

    /// The text that these bytes complete. Bytes that belong to no character become U+FFFD.
    mutating func append(_ bytes: [UInt8]) -> String {
        held += bytes
        if let start = startOfStop {
            isStopped = true
            return release(start, dropping: held.count - start)
        }
        return release(held.count - max(lengthOfPartialStop, lengthOfPartialCharacter))
    }

    /// At the end of the text: what only looked like the start of a stop string.
    mutating func finish() -> String {
        release(held.count - lengthOfPartialCharacter)
    }

    private mutating func release(_ count: Int, dropping dropped: Int = 0) -> String {
        let text = String(decoding: held.prefix(count), as: UTF8.self)
        held.removeFirst(count + dropped)
        return text
    }

    /// Where the first stop string begins.
    private var startOfStop: Int? {
        held.indices.first { start in stops.contains { held[start...].starts(with: $0) } }
    }

    /// How many of the last bytes may become a stop string.
    private var lengthOfPartialStop: Int {
        let longest = min(held.count, (stops.map(\.count).max() ?? 0) - 1)
        guard longest > 0 else { return 0 }
        return (1...longest).last { length in stops.contains { $0.starts(with: held.suffix(length)) } } ?? 0
    }

    private var lengthOfPartialCharacter: Int {
        for length in 1..<4 where length <= held.count {
            switch held[held.count - length] {
            case 0x80...0xBF: continue  // goes on with a character
            case 0xC2...0xDF: return length < 2 ? length : 0
            case 0xE0...0xEF: return length < 3 ? length : 0
            case 0xF0...0xF4: return length
            default: return 0
            }
        }
        return 0
    }
}
