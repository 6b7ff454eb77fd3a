import Foundation
import TTTCommand

let command = Command(
    output: { FileHandle.standardOutput.write(Data($0.utf8)) },
    remarks: { FileHandle.standardError.write(Data($0.utf8)) },
    nextLine: { readLine() })
exit(await command.run(Array(CommandLine.arguments.dropFirst())))
